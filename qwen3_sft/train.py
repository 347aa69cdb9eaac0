"""Entry of a run: `accelerate launch --config_file config/single.json -m qwen3_sft.train ...`.

Nothing heavy is imported before logging is set up, because torch and torchao speak at import.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from qwen3_sft.errors import DONE, INTERRUPTED, exit_code_of, unless_stopped
from qwen3_sft.logs import once_per_node, set_up_logging
from qwen3_sft.options.command_line import read_options
from qwen3_sft.options.help_text import help_for
from qwen3_sft.options.variables import check_launcher_variables

logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> int:
    """Train; return the exit code: 0 done, 2 bad arguments or data, 1 a run that failed.

    Options are read before torch is imported, so that a mistake in them is told at once.

    The code is also written to the file that QWEN3_SFT_EXIT_FILE names: accelerate's launcher
    turns every failure into 1, and qwen3_sft.sh wants to tell them apart. A run that a signal has
    interrupted ends with 75; torchrun, which would call that a failure and restart it, is told 0.
    """
    set_up_logging()
    words = sys.argv[1:] if argv is None else argv
    exit_file = os.environ.get("QWEN3_SFT_EXIT_FILE")
    # Our launcher says once, for all its processes, that they were stopped.
    report_stop = logger.debug if exit_file else logger.info
    report = once_per_node(logger.error, exit_file)
    code = unless_stopped(lambda: exit_code_of(lambda: _train(words), report), report_stop)
    if exit_file:
        Path(exit_file).write_text(str(code), encoding="utf-8")
    may_restart = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0
    is_under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    if code == INTERRUPTED and is_under_torchrun and (exit_file or may_restart):
        return DONE
    return code


def _train(argv: list[str]) -> int:
    if text := help_for(argv):
        logger.info("%s", text)
        return DONE
    check_launcher_variables(os.environ)
    read_options(argv)
    from qwen3_sft.run import run_command

    return run_command(argv)


def _end(code: int) -> None:
    """Leave the process; one that failed among several must not wait for them while it unloads."""
    if code not in (DONE, INTERRUPTED) and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    _end(main())

"""accelerate's launcher or torchrun without their last word: `python -m ... MODULE ARGS`.

Both end a failed run with a traceback of their own below the sentence in which a worker has said
what is wrong. Here that is left out where a worker has spoken (QWEN3_SFT_EXIT_FILE holds its code),
and after a signal.

Remove when torchrun ends without a traceback once its workers have reported: quiet_agent
"""

from __future__ import annotations

import logging
import os
import runpy
import sys
from pathlib import Path

from qwen3_sft.errors import BY_SIGNAL, DONE, FAILED
from qwen3_sft.logs import set_up_logging

logger = logging.getLogger(__name__)

# Says of each process that it is ended because another one was, and with which code that ended.
_TORCH = "torch.distributed.elastic.multiprocessing.api"


def quiet(command: list[str]) -> list[str]:
    """Return a command `PYTHON -m MODULE ARGS` that runs the module through this one."""
    return [*command[:2], "qwen3_sft.launch.quiet_agent", *command[2:]]


def main(argv: list[str] | None = None) -> int:
    """Run a module as a program; return its exit code, 1 where one of its processes failed."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger(_TORCH).setLevel(logging.CRITICAL)  # after its import, which sets it
    module, *words = sys.argv[1:] if argv is None else argv
    sys.argv = [module, *words]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except ChildFailedError as error:
        if not _has_spoken(os.environ.get("QWEN3_SFT_EXIT_FILE")):
            set_up_logging(sys.stderr)
            logger.error("%s", error)
        return FAILED
    except SignalException as error:
        return BY_SIGNAL + error.sigval
    return DONE


def _has_spoken(exit_file: str | None) -> bool:
    return exit_file is not None and Path(exit_file).is_file()


if __name__ == "__main__":
    sys.exit(main())

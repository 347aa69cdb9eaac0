"""Entry of a run: `accelerate launch --config_file config/single.json -m qwen3_sft.train ...`.

Nothing heavy is imported before logging is set up, because torch and torchao speak at import.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from qwen3_sft.logs import set_up_logging


def main(argv: list[str] | None = None) -> int:
    """Train; return the exit code: 0 done, 2 bad arguments or data, 1 a run that failed.

    The code is also written to the file that QWEN3_SFT_EXIT_FILE names: accelerate's launcher
    turns every failure into 1, and qwen3_sft.sh wants to tell them apart.
    """
    set_up_logging()
    from qwen3_sft.run import run_command

    code = run_command(sys.argv[1:] if argv is None else argv)
    if exit_file := os.environ.get("QWEN3_SFT_EXIT_FILE"):
        Path(exit_file).write_text(str(code), encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main())

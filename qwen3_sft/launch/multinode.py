"""Entry of one node of several: `python -m qwen3_sft.launch.multinode [--option value ...]`.

Nothing heavy is imported before logging is set up, because torch and torchao speak at import.
"""

from __future__ import annotations

import logging
import sys

from qwen3_sft.errors import unless_stopped
from qwen3_sft.logs import set_up_logging

logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> int:
    """Run this node's part; return the exit code: 0 done, 2 a mistake, 1 a run that failed.

    Environment:
        NNODES, NODE_RANK, MASTER_ADDR and others: see `qwen3_sft_multinode.sh`.
        ACCELERATE_CONFIG: the launch file.
        DRY_RUN: 1 prints plan, command and variables instead.
    """
    set_up_logging()
    return unless_stopped(lambda: _run_node(sys.argv[1:] if argv is None else argv), logger.info)


def _run_node(argv: list[str]) -> int:
    from qwen3_sft.launch.node import run_node

    return run_node(argv)


if __name__ == "__main__":
    sys.exit(main())

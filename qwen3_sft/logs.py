"""Logging of a run: our lines plain on standard output, other libraries' warnings kept."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

_SLOW_BYTES = 2 << 30  # about two seconds of a good disk
# They report at import that CUDA extensions for other builds exist, which no user can act on.
_CHATTY_AT_IMPORT = ("torchao", "torch.utils._pytree")
# Says on every rank that a gather over two mesh dimensions takes two collectives.
_CHATTY_WHEN_SHARDED = ("torch.distributed.tensor._redistribute",)


def set_up_logging(stream: TextIO | None = None) -> None:
    """Send our INFO lines of rank 0, and warnings of all ranks, to `stream` (standard output)."""
    rank = os.environ.get("RANK", "0")
    handler = logging.StreamHandler(stream or sys.stdout)
    prefix = "" if rank == "0" else f"[rank {rank}] "
    handler.setFormatter(logging.Formatter(f"{prefix}%(message)s"))
    for name in ("qwen3_sft", "monkey_patch"):
        log = logging.getLogger(name)
        log.handlers = [handler]
        log.setLevel(logging.INFO if rank == "0" else logging.WARNING)
        log.propagate = False
    for name in (*_CHATTY_AT_IMPORT, *_CHATTY_WHEN_SHARDED):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def progress_bars(num_bytes: int) -> Iterator[None]:
    """Show transformers' bars only where reading or writing `num_bytes` takes a while."""
    from transformers.utils import logging as transformers_logging

    was_enabled = transformers_logging.is_progress_bar_enabled()
    if num_bytes < _SLOW_BYTES:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()

"""Logging of a run: our lines plain on standard output, other libraries' warnings kept."""

from __future__ import annotations

import logging
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

_SLOW_BYTES = 2 << 30  # about two seconds of a good disk
_PATIENCE_S, _POLL_S = 1.0, 0.05
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


def once_per_node(
    report: Callable[[str], object], exit_file: str | None
) -> Callable[[str], object]:
    """Return a report that leaves out what another process of this node has said in these words.

    Most mistakes meet every process alike. One that meets some alone is told by these; the first
    process of a node has a moment to speak before the others.

    Args:
        report: takes a message.
        exit_file: QWEN3_SFT_EXIT_FILE, which all processes of our launcher share; None without it.
    """
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")

    def say(text: str) -> None:
        if exit_file is not None:
            mark = Path(f"{exit_file}-{attempt}-{zlib.crc32(text.encode())}")
            end = time.monotonic() + (0 if is_first else _PATIENCE_S)
            while not mark.exists() and time.monotonic() < end:
                time.sleep(_POLL_S)
            try:
                mark.touch(exist_ok=False)
            except FileExistsError:
                return
        report(text)

    return say


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

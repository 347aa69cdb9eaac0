"""Work that only rank 0 does between collectives, and whose failure all ranks raise together.

An exception on one rank alone leaves the others in their next collective until its timeout, half an
hour by default, and then ends them with a message about the timeout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch.distributed as dist
from safetensors import SafetensorError

T = TypeVar("T")

# What disks, files and conversions raise; a mistake in the code still ends rank 0 at its place.
_FAILURES = (OSError, RuntimeError, ValueError, SafetensorError)


class RankZero:
    """Rank 0's work; `agree` is collective and has to be reached by every rank."""

    def __init__(self, what: object, raises: type[Exception]) -> None:
        """Nothing has failed yet.

        Args:
            what: what is being worked on, for the message.
            raises: what `agree` raises on every rank.
        """
        self._what, self._raises = what, raises
        self._is_first = process_rank() == 0
        self._error: Exception | None = None

    def do(self, work: Callable[..., Any], *args: Any) -> Any:
        """Return `work(*args)`; None on other ranks and once something has failed."""
        if not self._is_first or self._error is not None:
            return None
        try:
            return work(*args)
        except _FAILURES as error:
            self._error = error
            return None

    def agree(self, result: Any = None) -> Any:
        """Wait until rank 0 comes here too; return its `result` (a small object) on every rank.

        Raises:
            Exception: of the type `raises`, with the same text on all ranks, if rank 0 has failed.
        """
        error = self._error
        text = None if error is None else str(error)
        if text is not None and not isinstance(error, self._raises):
            text = f"{self._what}: {type(error).__name__}: {text}"
        is_done = False
        while not is_done:
            is_done, text, result = _broadcast([True, text, result])
        if text is not None:
            raise self._raises(text) from error
        return result

    def sign_of_life(self) -> None:
        """Let the ranks that wait in `agree` wait once more; for rank 0, inside long work."""
        if self._is_first:
            _broadcast([False, None, None])


def on_first_rank(work: Callable[[], T]) -> T:
    """Run `work` on rank 0 alone and return its result (a small object) on every rank; collective.

    Raises:
        Exception: what `work` raised of `_FAILURES`, on every rank.
    """
    result: T | None = None
    error: Exception | None = None
    if process_rank() == 0:
        try:
            result = work()
        except _FAILURES as failure:
            error = failure
    result, error = _broadcast([result, error])
    if error is not None:
        raise error
    return cast(T, result)


def _broadcast(message: list[Any]) -> list[Any]:
    """Return rank 0's message on every rank."""
    if dist.is_available() and dist.is_initialized():
        dist.broadcast_object_list(message, src=0)
    return message


def process_rank() -> int:
    """Return the rank in the default process group; 0 without one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0

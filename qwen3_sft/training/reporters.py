"""Reporters (W&B, MLflow, TensorBoard, ...) that cannot end a run.

Transformers calls them like any other callback, so that a server that is down, a login that has
expired or a full disk under their files ends the training with the reporter's exception.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

logger = logging.getLogger(__name__)

MAX_FAILURES = 3  # in a row: each may have cost a minute of waiting for a server
_MODULE = "transformers.integrations"


def guard_reporters(callbacks: list[TrainerCallback]) -> list[TrainerCallback]:
    """Turn every failure of a reporter into a warning; return the reporters among `callbacks`.

    A reporter that has failed `MAX_FAILURES` times in a row is not called any more.

    Args:
        callbacks: of a trainer; those that transformers made for --report_to are changed in place.
    """
    reporters = [c for c in callbacks if type(c).__module__.startswith(_MODULE)]
    for reporter in reporters:
        guard(reporter)
    return reporters


def guard(reporter: TrainerCallback) -> None:
    """Guard the events of one reporter, which share one count of failures."""
    failures = _Failures(type(reporter).__name__)
    for event in dir(TrainerCallback):
        # Inherited ones do nothing, and must not count as a success in between.
        is_own = getattr(type(reporter), event) is not getattr(TrainerCallback, event)
        if event.startswith("on_") and is_own:
            setattr(reporter, event, failures.guarded(event, getattr(reporter, event)))


class _Failures:
    """How often one reporter failed in a row."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.in_a_row = 0

    def guarded(self, event: str, work: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(work)
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.in_a_row >= MAX_FAILURES:
                return None
            try:
                result = work(*args, **kwargs)
            # Each backend has exceptions of its own, and none of them is worth the run.
            except Exception as error:
                self.in_a_row += 1
                off = self.in_a_row == MAX_FAILURES
                logger.warning(
                    "%s failed in %s (%s: %s); training goes on%s", self.name, event,
                    type(error).__name__, error, " without it" if off else "",
                )  # fmt: skip
                return None
            self.in_a_row = 0
            return result

        return call

"""What is done about memory: little of it, all of it early, and words when it runs out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from qwen3_sft.checkpoints.folders import step_of
from qwen3_sft.hardware import MemoryStats
from qwen3_sft.plan.advice import MemorySettings, Stage, advice
from qwen3_sft.training.memory_warm_up import MemoryWarmUp
from qwen3_sft.training.out_of_memory import naming

logger = logging.getLogger(__name__)

_FULL = 0.95  # share of memory above which the allocator begins to thrash


class MemoryGuard:
    """Warm-up, warnings, and errors that name this run's settings.

    Attributes:
        warm_up: to be called back before the first step.
        watch: to be shown the memory at each record.
    """

    def __init__(self, trainer: Any) -> None:
        """Remember whose memory it is.

        Args:
            trainer: an `SftTrainer` that has its arguments, engine and data collator.
        """
        self._trainer = trainer
        self._settings = MemorySettings.of(
            trainer.args, trainer.engine, trainer.data_collator.max_length
        )
        self.warm_up = MemoryWarmUp(trainer)
        self.watch = MemoryWatch(self._settings)

    def naming(self, stage: Stage | Callable[[], Stage]) -> AbstractContextManager[None]:
        """Turn a lack of memory inside into an error that says what to set in this run.

        Args:
            stage: what is being done, or a function that is asked when it has failed.
        """
        return naming(stage, self._settings, so_far=self._so_far, part=self._part)

    def _part(self) -> str | None:
        fused = self._trainer.backward_optimizer
        return None if fused is None or fused.updating is None else f"update of {fused.updating}"

    def _so_far(self) -> str:
        if self.warm_up.is_running:
            return "this is the memory warm-up, nothing was trained yet"
        steps = f"{self._trainer.state.global_step} steps are done"
        output_dir = self._trainer.saver.folder
        folders = [path for path in output_dir.glob("checkpoint-*") if path.is_dir()]
        if not folders:
            return f"{steps} and no checkpoint is written yet"
        return f"{steps}, the last checkpoint is whole: {max(folders, key=step_of).name}"


class MemoryWatch:
    """Warns when the allocator thrashes or is about to; each kind once per further retry."""

    def __init__(self, run: MemorySettings) -> None:
        """Begin with nothing seen.

        Args:
            run: the options to advise on.
        """
        lines = advice(run, "forward and backward of a micro-batch")
        self._advice = "set " + ", or ".join(lines[:3])
        self._retries = 0
        self._has_warned = False

    def check(self, memory: MemoryStats) -> None:
        """Log what to set when allocations were retried or over 95% of memory is reserved."""
        if memory.allocation_retries > self._retries:
            self._retries = memory.allocation_retries
            logger.warning(
                "the CUDA allocator had to flush its cache %d times so far, each one stalls the "
                "GPU: %s", self._retries, self._advice,
            )  # fmt: skip
        share = memory.peak_reserved_gib / memory.total_gib
        if share > _FULL and not self._has_warned:
            self._has_warned = True
            logger.warning("%.0f%% of memory is in use: %s", 100 * share, self._advice)

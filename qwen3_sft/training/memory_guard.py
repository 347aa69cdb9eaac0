"""What the Trainer does about memory: little of it, all of it early, and words when it runs out."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from qwen3_sft.checkpoints.folders import step_of
from qwen3_sft.checkpoints.restore import CheckpointedTrainer
from qwen3_sft.optimizers.choice import OptimizerChoice, with_states
from qwen3_sft.optimizers.in_backward import BackwardOptimizer
from qwen3_sft.plan.advice import MemorySettings, Stage
from qwen3_sft.training.memory_warm_up import MemoryWarmUp
from qwen3_sft.training.out_of_memory import naming


class MemoryTrainer(CheckpointedTrainer):
    """Trainer with the optimizer in backward, the memory warm-up and errors that name settings."""

    data_collator: Any

    def __init__(self, **kwargs: Any) -> None:
        """Set up the warm-up.

        Args:
            **kwargs: as for `CheckpointedTrainer`; the data collator knows `max_length`.
        """
        super().__init__(**kwargs)
        self.backward_optimizer: BackwardOptimizer | None = None
        self.memory_settings = MemorySettings.of(
            self.args, self.engine, self.data_collator.max_length
        )
        self.memory_warm_up = MemoryWarmUp(self)
        self.add_callback(self.memory_warm_up)

    # ---- optimizer ----

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, dict[str, Any]]:
        """Know torchao's AdamWFp8 too."""
        chosen = CheckpointedTrainer.get_optimizer_cls_and_kwargs(args, model)
        return with_states(OptimizerChoice.of(args), chosen)

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """Have the optimizer step within the backward pass if the run asks for it."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and self.args.optimizer_in_backward:
            self.backward_optimizer = BackwardOptimizer(
                self.model, optimizer, clip=self.args.clip, max_grad_norm=self.args.max_grad_norm
            )
        return optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Warm up while the optimizer is still a fresh one."""
        if checkpoint is not None:
            self.memory_warm_up.before_loading()
        super()._load_optimizer_and_scheduler(checkpoint)

    # ---- out of memory ----

    def naming(self, stage: Stage | Callable[[], Stage]) -> AbstractContextManager[None]:
        """Turn a lack of memory inside into an error that says what to set in this run.

        Args:
            stage: what is being done, or a function that is asked when it has failed.
        """
        return naming(stage, self.memory_settings, so_far=self._so_far, part=self._part)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Name what nothing closer inside has named."""
        with self.naming("preparation, start checks or samples"):
            return super()._inner_training_loop(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Between micro-batches and evaluations only the update takes memory of the device."""
        with self.naming("update of the optimizer"):
            super()._run_epoch(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run forward and backward of one micro-batch."""
        with self.naming("forward and backward of a micro-batch"):
            return super().training_step(*args, **kwargs)

    def _part(self) -> str | None:
        fused = self.backward_optimizer
        return None if fused is None or fused.updating is None else f"update of {fused.updating}"

    def _so_far(self) -> str:
        if self.memory_warm_up.is_running:
            return "this is the memory warm-up, nothing was trained yet"
        steps = f"{self.state.global_step} steps are done"
        folders = [path for path in self._output_dir.glob("checkpoint-*") if path.is_dir()]
        if not folders:
            return f"{steps} and no checkpoint is written yet"
        return f"{steps}, the last checkpoint is whole: {max(folders, key=step_of).name}"

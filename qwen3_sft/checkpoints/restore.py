"""The Trainer's loading, replaced by `folders.py`'s: verified and strict."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import nn
from transformers.trainer import SCHEDULER_NAME

from qwen3_sft.checkpoints import sharded as sharded_checkpoint
from qwen3_sft.checkpoints.manifest import read_manifest, verify
from qwen3_sft.checkpoints.save import SavingTrainer
from qwen3_sft.checkpoints.trust import best_checkpoint, refuse_foreign_code
from qwen3_sft.checkpoints.whole import load_weights
from qwen3_sft.distributed.rank_zero import on_first_rank
from qwen3_sft.errors import CheckpointError

logger = logging.getLogger(__name__)


class CheckpointedTrainer(SavingTrainer):
    """Trainer whose checkpoints are published whole and restored strictly, on every engine."""

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        """Restore the weights strictly; upstream leaves the experts as they are, silently.

        Not called under DeepSpeed, which loads all it has at once. The files were hashed when the
        checkpoint was chosen (`resume.choose_checkpoint`).
        """
        self._load_weights(Path(resume_from_checkpoint))

    def _load_weights(self, folder: Path) -> None:
        if self.engine.layout == "dtensor":
            sharded_checkpoint.load_sharded_weights(self.model, folder)
        else:
            load_weights(self.model, folder)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Upstream trains one step too many when it resumes from the last checkpoint."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Upstream goes on without a word when a file is missing.

        Raises:
            CheckpointError: naming the missing file.
        """
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        self._restore_facts(folder)
        if self.engine.layout == "dtensor":
            sharded_checkpoint.load_optimizer(self.model, self._torch_optimizer(), folder)
            sharded_checkpoint.load_scheduler(self.lr_scheduler, folder / SCHEDULER_NAME)
            return
        needed = ("optimizer.pt", "scheduler.pt") if self.engine.layout == "whole" else ("latest",)
        for name in needed:
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder}/{name}: missing, cannot resume from here")
        super()._load_optimizer_and_scheduler(checkpoint)

    def _restore_facts(self, folder: Path) -> None:
        manifest = read_manifest(folder)
        self.skipped_steps = manifest["skipped_steps"]
        self.tokens_seen = manifest["tokens_seen"]
        if manifest["world_size"] != self.args.world_size:
            logger.info(
                "resuming a run of %d processes on %d: data order is kept, random states of "
                "dropout are not", manifest["world_size"], self.args.world_size,
            )  # fmt: skip

    def _load_best_model(self) -> None:
        """Go back to the best checkpoint's weights, experts included."""
        best = best_checkpoint(self.state.best_model_checkpoint, self._output_dir)
        self.state.best_model_checkpoint = str(best)
        on_first_rank(lambda: verify(best))
        on_first_rank(lambda: refuse_foreign_code(best, trusted=self.args.trust_checkpoint))
        if self.engine.layout == "zero":
            super()._load_best_model()
        else:
            self._load_weights(best)
        logger.info("best model: %s, %s", best, self.state.best_metric)

"""The Trainer's saving and loading, replaced by `checkpoint.py`'s: whole, verified, strict."""

from __future__ import annotations

import logging
import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints

from qwen3_sft.checkpoint import (
    CheckpointError,
    load_weights,
    publish,
    read_manifest,
    refuse_non_finite,
    seal,
    verify,
)
from qwen3_sft.logs import progress_bars

logger = logging.getLogger(__name__)

_STAGING = ".saving"


class CheckpointedTrainer(Trainer):
    """Trainer whose checkpoints are published whole and restored strictly."""

    # Upstream declares these as optional or as unions that a type checker cannot narrow.
    args: Any
    model: Any
    processing_class: Any
    current_flos: Any

    def __init__(self, *, run_facts: dict[str, Any], **kwargs: Any) -> None:
        """Keep what every manifest records beside the files.

        Args:
            run_facts: data key, chat format, versions and the like.
            **kwargs: as for `transformers.Trainer`.
        """
        super().__init__(**kwargs)
        self.run_facts = run_facts
        self.skipped_steps = 0
        self._is_staging = False

    def pause_metrics(self) -> AbstractContextManager[None]:
        """Leave the time spent inside out of the step time."""
        raise NotImplementedError

    @property
    def _output_dir(self) -> Path:
        return Path(str(self.args.output_dir))

    def _get_output_dir(self, trial: Any) -> str:
        """While a checkpoint is being written, point upstream's code at the staging folder."""
        return str(self._output_dir / _STAGING) if self._is_staging else str(self._output_dir)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Let upstream write aside, then seal, publish and only then rotate.

        Raises:
            CheckpointError: a weight is NaN or Inf.
        """
        with self.pause_metrics():
            step = self.state.global_step
            refuse_non_finite(self.model, step)
            staging, name = self._output_dir / _STAGING, f"checkpoint-{step}"
            if self.is_world_process_zero():
                shutil.rmtree(staging, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            self._is_staging = True
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._is_staging = False
            self.accelerator.wait_for_everyone()
            self._point_best_at(name)
            if self.is_world_process_zero():
                self.state.save_to_json(str(staging / name / TRAINER_STATE_NAME))
                seal(staging / name, **self._facts())
                publish(staging / name, self._output_dir / name)
                staging.rmdir()
                rotate_checkpoints(
                    output_dir=str(self._output_dir),
                    save_total_limit=self.args.save_total_limit,
                    best_model_checkpoint=self.state.best_model_checkpoint,
                    use_mtime=True,
                )
                logger.info("step %d  saved %s", step, self._output_dir / name)
            self.accelerator.wait_for_everyone()

    def _point_best_at(self, name: str) -> None:
        """Upstream looks for the best checkpoint in the staging folder; name its real place."""
        if self.state.best_global_step:
            best = self._output_dir / f"checkpoint-{self.state.best_global_step}"
            if best.name == name or best.is_dir():
                self.state.best_model_checkpoint = str(best)

    def _facts(self) -> dict[str, Any]:
        return {
            "step": self.state.global_step,
            "world_size": self.args.world_size,
            "seed": self.args.seed,
            "skipped_steps": self.skipped_steps,
            **self.run_facts,
        }

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Write model and tokenizer; unlike upstream no pickle of the arguments."""
        if self.args.should_save:
            size = sum(p.numel() * p.element_size() for p in self.model.parameters())
            with progress_bars(size):
                self.model.save_pretrained(output_dir or self._output_dir, state_dict=state_dict)
            self.processing_class.save_pretrained(output_dir or self._output_dir)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        """Restore the weights strictly; upstream leaves the experts as they are, silently.

        The files were hashed when the checkpoint was chosen (`run_folder.choose_checkpoint`).
        """
        manifest = read_manifest(Path(resume_from_checkpoint))
        self.skipped_steps = manifest["skipped_steps"]
        if manifest["world_size"] != self.args.world_size:
            logger.warning(
                "resuming a run of %d processes on %d: data order is kept, random states of "
                "dropout are not", manifest["world_size"], self.args.world_size,
            )  # fmt: skip
        load_weights(self.model, Path(resume_from_checkpoint))

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Upstream trains one step too many when it resumes from the last checkpoint."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Upstream goes on without a word when a file is missing.

        Raises:
            CheckpointError: naming the missing file.
        """
        for name in ("optimizer.pt", "scheduler.pt"):
            if checkpoint is not None and not (Path(checkpoint) / name).is_file():
                raise CheckpointError(f"{checkpoint}/{name}: missing, cannot resume from here")
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_best_model(self) -> None:
        """Go back to the best checkpoint's weights, experts included."""
        best = Path(str(self.state.best_model_checkpoint))
        verify(best)
        load_weights(self.model, best)
        logger.info("best model: %s, %s", best, self.state.best_metric)

"""The Trainer's saving and loading, replaced by `checkpoint.py`'s: whole, verified, strict."""

from __future__ import annotations

import logging
import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints

from qwen3_sft import sharded_checkpoint
from qwen3_sft.checkpoint import (
    CheckpointError,
    load_weights,
    publish,
    read_manifest,
    refuse_non_finite,
    seal,
    verify,
)
from qwen3_sft.engine import Engine
from qwen3_sft.hub_writer import write_hub_model
from qwen3_sft.logs import progress_bars
from qwen3_sft.rank_zero import RankZero, on_first_rank

logger = logging.getLogger(__name__)

_STAGING = ".saving"
# What a full or failing disk raises; torch.save a RuntimeError that names this file of torch.
_WRITE_FAILURES = (OSError, SafetensorError, CheckpointException, RuntimeError)
_TORCH_WRITER = "inline_container"


def rows_per_step(args: Any) -> int:
    """Return the packed rows of one optimizer step over all processes."""
    return args.world_size * args.per_device_train_batch_size * args.gradient_accumulation_steps


class CheckpointedTrainer(Trainer):
    """Trainer whose checkpoints are published whole and restored strictly, on every engine."""

    # Upstream declares these as optional or as unions that a type checker cannot narrow.
    args: Any
    model: Any
    model_wrapped: Any
    optimizer: Any
    lr_scheduler: Any
    processing_class: Any
    current_flos: Any

    def __init__(self, *, run_facts: dict[str, Any], engine: Engine, **kwargs: Any) -> None:
        """Keep what every manifest records beside the files.

        Args:
            run_facts: data key, chat format, versions and the like.
            engine: what spreads the run over processes.
            **kwargs: as for `transformers.Trainer`.
        """
        args = kwargs["args"]
        save_only_model = args.save_only_model
        # Upstream refuses to save a natively sharded model with its optimizer, and one sharded by
        # accelerate without it; this class does both.
        if engine.layout == "dtensor":
            args.save_only_model = engine.kind == "native"
        super().__init__(**kwargs)
        args.save_only_model = save_only_model
        self.run_facts = run_facts
        self.engine = engine
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

    # ---- saving ----

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Let upstream write aside, then seal, publish and only then rotate.

        Raises:
            CheckpointError: a weight is NaN or Inf, or a file cannot be written.
        """
        with self.pause_metrics():
            step = self.state.global_step
            refuse_non_finite(self.model, step)
            staging, name = self._output_dir / _STAGING, f"checkpoint-{step}"
            failed = f"step {step}: no checkpoint was written, earlier ones are whole"
            rank0 = RankZero(failed, raises=CheckpointError)
            rank0.do(_make_anew, staging)
            rank0.agree()
            if self.engine.layout != "whole":
                _refuse_private_folder(staging)
            self._is_staging = True
            try:
                super()._save_checkpoint(model, trial)
            except _WRITE_FAILURES as error:
                if isinstance(error, RuntimeError) and _TORCH_WRITER not in str(error):
                    raise
                free = shutil.disk_usage(self._output_dir).free / 1e9
                raise CheckpointError(
                    f"{failed}: {_cause(error)} ({free:.1f} GB free in {self._output_dir})"
                ) from error
            finally:
                self._is_staging = False
            self.accelerator.wait_for_everyone()
            self._point_best_at(name)
            rank0.do(self._publish, staging, name)
            rank0.agree()
            logger.info("step %d  saved %s", step, self._output_dir / name)

    def _publish(self, staging: Path, name: str) -> None:
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
            "rows_per_step": rows_per_step(self.args),
            "engine": str(self.engine),
            "layout": self.engine.layout,
            "seed": self.args.seed,
            "skipped_steps": self.skipped_steps,
            "save_only_model": self.args.save_only_model,
            **self.run_facts,
        }

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the weights as the engine's layout wants them; ZeRO's come with its optimizer."""
        folder = Path(output_dir or self._output_dir)
        if self.engine.layout == "whole":
            super().save_model(str(folder), _internal_call)
            return
        if self.engine.layout == "dtensor":
            if self._saves_whole_weights():
                write_hub_model(self.model, folder, self.model.dtype)
            else:
                sharded_checkpoint.save_weights(self.model, folder)
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            self.model.config.save_pretrained(folder)
            self.processing_class.save_pretrained(folder)

    def _saves_whole_weights(self) -> bool:
        plugin = self.accelerator.state.fsdp_plugin if self.engine.kind == "fsdp" else None
        return plugin is not None and "FULL_STATE_DICT" in str(plugin.state_dict_type)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Write model and tokenizer; unlike upstream no pickle of the arguments."""
        if self.args.should_save:
            size = sum(p.numel() * p.element_size() for p in self.model.parameters())
            with progress_bars(size):
                self.model.save_pretrained(output_dir or self._output_dir, state_dict=state_dict)
            self.processing_class.save_pretrained(output_dir or self._output_dir)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Upstream would write a natively sharded optimizer's first shard for the whole of it."""
        if self.engine.layout != "dtensor":
            super()._save_optimizer_and_scheduler(output_dir)
            return
        sharded_checkpoint.save_optimizer(self.model, self._torch_optimizer(), Path(output_dir))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _torch_optimizer(self) -> Any:
        """Torch's optimizer below accelerate's wrapper."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    # ---- loading ----

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        """Restore the weights strictly; upstream leaves the experts as they are, silently.

        Not called under DeepSpeed, which loads all it has at once. The files were hashed when the
        checkpoint was chosen (`run_folder.choose_checkpoint`).
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
        else:
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
        if manifest["world_size"] != self.args.world_size:
            logger.info(
                "resuming a run of %d processes on %d: data order is kept, random states of "
                "dropout are not", manifest["world_size"], self.args.world_size,
            )  # fmt: skip
        if manifest["data_key"] != self.run_facts["data_key"]:
            logger.warning(
                "%s was saved on other data (%s, now %s): its place in the epoch is taken in the "
                "new data", folder, manifest["data_key"], self.run_facts["data_key"],
            )  # fmt: skip

    def _load_best_model(self) -> None:
        """Go back to the best checkpoint's weights, experts included."""
        best = Path(str(self.state.best_model_checkpoint))
        on_first_rank(lambda: verify(best))
        if self.engine.layout == "zero":
            super()._load_best_model()
        else:
            self._load_weights(best)
        logger.info("best model: %s, %s", best, self.state.best_metric)


def _make_anew(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _refuse_private_folder(folder: Path) -> None:
    """Raise on all ranks if some do not see what rank 0 has made: the shards would lie apart."""
    if not dist.is_initialized():
        return
    seen: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(seen, folder.is_dir())
    if not all(seen):
        blind = ", ".join(str(rank) for rank, sees in enumerate(seen) if not sees)
        raise CheckpointError(
            f"ranks {blind} do not see {folder}, which rank 0 has made: set --output_dir to a "
            "folder that all nodes share, each of them writes its part of a checkpoint"
        )


def _cause(error: BaseException) -> BaseException:
    """Return what the first rank that failed raised inside torch's distributed checkpoint."""
    if isinstance(error, CheckpointException):
        return next(iter(error.failures.values()))[0]
    return error

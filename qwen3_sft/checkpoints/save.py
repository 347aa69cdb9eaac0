"""The Trainer's saving: written aside, hashed on the way, sealed, renamed; only then rotated.

Each process writes through its `Ledger`; rank 0 collects what they wrote, adds the small files that
upstream's code writes by itself, and publishes. Ranks agree on failures where all of them are at
the same place, never in the middle of a collective save.
"""

from __future__ import annotations

import logging
import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME

from qwen3_sft.checkpoints.finite import refuse_non_finite
from qwen3_sft.checkpoints.folders import STAGING, clear_leftovers, publish
from qwen3_sft.checkpoints.free_space import bytes_to_save, refuse_full_disk
from qwen3_sft.checkpoints.ledger import Entry, Ledger
from qwen3_sft.checkpoints.manifest import seal
from qwen3_sft.checkpoints.rotation import rotate
from qwen3_sft.checkpoints.write import WritingTrainer, noting
from qwen3_sft.distributed.rank_zero import RankZero
from qwen3_sft.errors import CheckpointError
from qwen3_sft.options.batch import rows_per_step

logger = logging.getLogger(__name__)


class SavingTrainer(WritingTrainer):
    """Trainer whose checkpoints are published whole or not at all, on every engine."""

    def pause_metrics(self) -> AbstractContextManager[None]:
        """Leave the time spent inside out of the step time."""
        raise NotImplementedError

    @property
    def _staging(self) -> Path:
        return self._output_dir / STAGING

    def _get_output_dir(self, trial: Any) -> str:
        """While a checkpoint is being written, point upstream's code at the staging folder."""
        return str(self._output_dir if self._ledger is None else self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Let upstream write aside, then seal, publish and only then rotate.

        Raises:
            CheckpointError: a tensor is NaN or Inf, the disk has no room, or a file cannot be
                written.
        """
        with self.pause_metrics():
            step = self.state.global_step
            name = f"checkpoint-{step}"
            failed = f"step {step}: no checkpoint was written, earlier ones are whole"
            rank0 = RankZero(failed, raises=CheckpointError)
            needed = self._prepare(rank0)
            ledger = self._ledger = Ledger(self._staging / name)
            try:
                with noting(ledger):
                    super()._save_checkpoint(model, trial)
            finally:
                self._ledger = None
            self._point_best_at(name)
            saved = _gather((ledger.entries, ledger.failure))
            rank0.do(self._finish_save, name, saved, f"{failed}: it takes about {needed} bytes")
            rank0.agree()
            logger.info("step %d  saved %s", step, self._output_dir / name)

    def _prepare(self, rank0: RankZero) -> int:
        """Refuse what should not or cannot be saved; return about how many bytes a save takes."""
        optimizer = None if self.args.save_only_model else self.optimizer
        device = self.args.device
        refuse_non_finite(self.model, self.state.global_step, optimizer, device)
        needed = bytes_to_save(self.model, optimizer, self.engine.layout, device)

        def make_room() -> None:
            self._output_dir.mkdir(parents=True, exist_ok=True)
            clear_leftovers(self._output_dir)
            refuse_full_disk(self._output_dir, needed)
            self._staging.mkdir()

        rank0.do(make_room)
        rank0.agree()
        if self.engine.layout != "whole":
            _refuse_private_folder(self._staging)
        return needed

    def _finish_save(self, name: str, saved: list[tuple[dict, str | None]], failed: str) -> None:
        """Publish what all ranks have written, then make room; rank 0's part.

        Raises:
            CheckpointError: a rank could not write.
        """
        try:
            for rank, (_, failure) in enumerate(saved):
                if failure is not None:
                    shutil.rmtree(self._staging, ignore_errors=True)
                    free = shutil.disk_usage(self._output_dir).free
                    raise CheckpointError(
                        f"{failed}, {free} are free in {self._output_dir}; rank {rank}: {failure}"
                    )
            entries = self._entries(name, [entries for entries, _ in saved])
            self._publish(self._staging, name, entries)
        finally:
            shutil.rmtree(self._staging, ignore_errors=True)
        rotate(
            self._output_dir, self.args.save_total_limit, self._output_dir / name,
            self.state.best_model_checkpoint,
        )  # fmt: skip

    def _entries(self, name: str, every: list[dict[str, Entry]]) -> dict[str, Entry]:
        entries = {file: entry for entries in every for file, entry in entries.items()}
        if self.engine.layout == "whole":  # rank 0 has written all but random states
            there = {file for file in entries if (self._staging / name / file).is_file()}
            if missing := entries.keys() - there:
                logger.warning(
                    "%s lie on other nodes and are not in the checkpoint: --output_dir is not "
                    "shared, a resumed run begins there with other random states",
                    ", ".join(sorted(missing)),
                )
            entries = {file: entries[file] for file in there}
        return entries

    def _publish(self, staging: Path, name: str, entries: dict[str, Entry]) -> None:
        self.state.save_to_json(str(staging / name / TRAINER_STATE_NAME))
        seal(staging / name, entries, **self._facts())
        publish(staging / name, self._output_dir / name)

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
            "tokens_seen": self.tokens_seen,
            "save_only_model": self.args.save_only_model,
            **self.run_facts,
        }


def _gather(mine: Any) -> list[Any]:
    """Return every rank's object on rank 0; collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [mine]
    every = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(mine, every)
    return every or []


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

"""Saving a checkpoint: written aside, hashed on the way, sealed, renamed; only then rotated.

Each process writes through its `Ledger`; rank 0 collects what they wrote, adds the small files that
upstream's code writes by itself, and publishes. Ranks agree on failures where all of them are at
the same place, never in the middle of a collective save.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from qwen3_sft.checkpoints.finite import refuse_non_finite
from qwen3_sft.checkpoints.folders import STAGING, clear_leftovers, publish, refuse_foreign
from qwen3_sft.checkpoints.free_space import bytes_to_save, refuse_full_disk
from qwen3_sft.checkpoints.ledger import Entry, Ledger
from qwen3_sft.checkpoints.manifest import Totals, seal
from qwen3_sft.checkpoints.rotation import rotate
from qwen3_sft.checkpoints.write import noting, write_enums_by_value
from qwen3_sft.distributed.engine import Engine
from qwen3_sft.distributed.rank_zero import RankZero
from qwen3_sft.errors import CheckpointError
from qwen3_sft.options.batch import rows_per_step

logger = logging.getLogger(__name__)


@contextmanager
def let_sharded_models_save(args: Any, engine: Engine) -> Iterator[None]:
    """Build a Trainer inside: upstream's refuses a DTensors' save that this project can do.

    With its optimizer if the model is sharded at load, without it if accelerate shards it.
    Remove when transformers saves a model sharded at load with its optimizer: this function
    """
    save_only_model = args.save_only_model
    if engine.layout == "dtensor":
        args.save_only_model = engine.kind == "native"
    yield
    args.save_only_model = save_only_model


class CheckpointSaver:
    """Publishes checkpoints whole or not at all, on every engine."""

    def __init__(
        self, args: Any, engine: Engine, run_facts: dict[str, Any], totals: Totals
    ) -> None:
        """Write nothing yet; every manifest will have `run_facts` and `totals` as they are then.

        `turn_ends` among the facts are the tokens that end a labelled turn.
        """
        self.turn_ends: list[str] = run_facts.get("turn_ends", [])
        self.folder = Path(str(args.output_dir))
        self._staging = self.folder / STAGING
        self._args, self._engine = args, engine
        self._run_facts, self._totals = run_facts, totals
        self._ledger: Ledger | None = None  # of the save that is going on

    @property
    def folder_now(self) -> Path:
        """Where upstream's code has to write: while a checkpoint is saved the staging folder."""
        return self.folder if self._ledger is None else self._staging

    @contextmanager
    def ledger(self, folder: Path) -> Iterator[Ledger]:
        """Give the ledger of the save that is going on, or one of its own for this folder.

        Raises:
            OSError: outside of a save, what the disk has refused.
        """
        ledger = self._ledger or Ledger(folder)
        yield ledger
        if self._ledger is None and ledger.error is not None:
            raise ledger.error

    def save(
        self, write: Callable[[], None], model: nn.Module, optimizer: Any, state: TrainerState
    ) -> None:
        """Have a checkpoint written aside, then seal, publish and only then rotate; collective.

        Args:
            write: writes all its parts below `folder_now`, through `ledger`.
            model: unwrapped, held by any engine.
            optimizer: of the model.
            state: of the training; told where its best checkpoint lies.

        Raises:
            CheckpointError: a tensor is NaN or Inf, the disk has no room, or a file cannot be
                written.
        """
        write_enums_by_value()
        step = state.global_step
        name = f"checkpoint-{step}"
        failed = f"step {step}: no checkpoint was written, earlier ones are whole"
        rank0 = RankZero(failed, raises=CheckpointError)
        needed = self._prepare(rank0, model, optimizer, step)
        ledger = self._ledger = Ledger(self._staging / name)
        try:
            with noting(ledger):
                write()
        finally:
            self._ledger = None
        self._point_best_at(name, state)
        saved = _gather((ledger.entries, ledger.failure))
        rank0.do(self._finish, name, state, saved, f"{failed}: it takes about {needed} bytes")
        rank0.agree()
        logger.info("step %d  saved %s", step, self.folder / name)

    def _prepare(self, rank0: RankZero, model: nn.Module, optimizer: Any, step: int) -> int:
        """Refuse what should not or cannot be saved; return about how many bytes a save takes."""
        saved = None if self._args.save_only_model else optimizer
        device = self._args.device
        refuse_non_finite(model, step, saved, device)
        needed = bytes_to_save(model, saved, self._engine.layout, device)

        def make_room() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            clear_leftovers(self.folder)
            refuse_foreign(self.folder / f"checkpoint-{step}")
            refuse_full_disk(self.folder, needed)
            self._staging.mkdir()

        rank0.do(make_room)
        rank0.agree()
        if self._engine.layout != "whole":
            _refuse_private_folder(self._staging)
        return needed

    def _finish(
        self, name: str, state: TrainerState, saved: list[tuple[dict, str | None]], failed: str
    ) -> None:
        """Publish what all ranks have written, then make room; rank 0's part.

        Raises:
            CheckpointError: a rank could not write.
        """
        try:
            for rank, (_, failure) in enumerate(saved):
                if failure is not None:
                    shutil.rmtree(self._staging, ignore_errors=True)
                    free = shutil.disk_usage(self.folder).free
                    raise CheckpointError(
                        f"{failed}, {free} are free in {self.folder}; rank {rank}: {failure}"
                    )
            entries = self._entries(name, [entries for entries, _ in saved])
            self._publish(name, state, entries)
        finally:
            shutil.rmtree(self._staging, ignore_errors=True)
        rotate(
            self.folder, self._args.save_total_limit, self.folder / name,
            state.best_model_checkpoint,
        )  # fmt: skip

    def _entries(self, name: str, every: list[dict[str, Entry]]) -> dict[str, Entry]:
        entries = {file: entry for entries in every for file, entry in entries.items()}
        if self._engine.layout == "whole":  # rank 0 has written all but random states
            there = {file for file in entries if (self._staging / name / file).is_file()}
            if missing := entries.keys() - there:
                logger.warning(
                    "%s lie on other nodes and are not in the checkpoint: --output_dir is not "
                    "shared, a resumed run begins there with other random states",
                    ", ".join(sorted(missing)),
                )
            entries = {file: entries[file] for file in there}
        return entries

    def _publish(self, name: str, state: TrainerState, entries: dict[str, Entry]) -> None:
        staged = self._staging / name
        state.save_to_json(str(staged / TRAINER_STATE_NAME))
        seal(staged, entries, **self._facts(state.global_step))
        publish(staged, self.folder / name)

    def _point_best_at(self, name: str, state: TrainerState) -> None:
        """Upstream looks for the best checkpoint in the staging folder; name its real place."""
        if state.best_global_step:
            best = self.folder / f"checkpoint-{state.best_global_step}"
            if best.name == name or best.is_dir():
                state.best_model_checkpoint = str(best)

    def _facts(self, step: int) -> dict[str, Any]:
        return {
            "step": step,
            "world_size": self._args.world_size,
            "rows_per_step": rows_per_step(self._args),
            "engine": str(self._engine),
            "layout": self._engine.layout,
            "seed": self._args.seed,
            **asdict(self._totals),
            "save_only_model": self._args.save_only_model,
            **self._run_facts,
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

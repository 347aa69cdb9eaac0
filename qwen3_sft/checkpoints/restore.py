"""Loading a checkpoint into a live model and optimizer: verified, and strict where upstream is not.

Remove when transformers loads fused experts from hub names strictly (issue 48805): restore_weights
Remove when transformers raises for a missing optimizer or scheduler: require_states
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers import TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from qwen3_sft.checkpoints.manifest import Totals, read_manifest, verify
from qwen3_sft.checkpoints.sharded import load_optimizer, load_scheduler, load_sharded_weights
from qwen3_sft.checkpoints.trust import best_checkpoint, refuse_foreign_code
from qwen3_sft.checkpoints.whole import load_weights
from qwen3_sft.distributed.rank_zero import on_first_rank
from qwen3_sft.errors import CheckpointError

logger = logging.getLogger(__name__)


def restore_weights(model: Any, folder: Path, layout: str) -> None:
    """Restore the weights of a verified checkpoint, not DeepSpeed's, strictly; collective.

    Raises:
        CheckpointError: the live model has other parameters than the files.
        ModelError: the files of a whole model miss a weight, or have one too many.
    """
    if layout == "dtensor":
        load_sharded_weights(model, folder)
    else:
        load_weights(model, folder)


def restore_states(model: Any, optimizer: Any, scheduler: Any, folder: Path) -> None:
    """Restore optimizer and schedule of a model made of DTensors; collective.

    Raises:
        CheckpointError: naming the missing file.
    """
    load_optimizer(model, optimizer, folder)
    load_scheduler(scheduler, folder / SCHEDULER_NAME)


def restore_totals(totals: Totals, folder: Path, world_size: int) -> None:
    """Go on counting from a checkpoint's manifest."""
    manifest = read_manifest(folder)
    totals.skipped_steps = manifest["skipped_steps"]
    totals.tokens_seen = manifest["tokens_seen"]
    if manifest["world_size"] != world_size:
        logger.info(
            "resuming a run of %d processes on %d: data order is kept, random states of "
            "dropout are not", manifest["world_size"], world_size,
        )  # fmt: skip


def require_states(folder: Path, layout: str) -> None:
    """Raise where upstream would go on without a word.

    Raises:
        CheckpointError: naming the missing file.
    """
    for name in (OPTIMIZER_NAME, SCHEDULER_NAME) if layout == "whole" else ("latest",):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}/{name}: missing, cannot resume from here")


def verified_best(state: TrainerState, output_dir: Path, *, trusted: bool) -> Path:
    """Return the best checkpoint, verified and without foreign code; collective.

    Args:
        state: names it, and is told its place in this run's folder.
        output_dir: of the run.
        trusted: load it although loading might run code (`--trust_checkpoint`).

    Raises:
        CheckpointError: on every rank.
    """
    best = best_checkpoint(state.best_model_checkpoint, output_dir)
    state.best_model_checkpoint = str(best)
    on_first_rank(lambda: verify(best))
    on_first_rank(lambda: refuse_foreign_code(best, trusted=trusted))
    return best

"""Loading a checkpoint into a live model and optimizer: verified, and strict where upstream is not.

Remove when transformers loads fused experts from hub names strictly (issue 48805): restore_weights
Remove when transformers raises for a missing optimizer or scheduler: require_states
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
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


def hyperparameters(optimizer: Any) -> list[dict[str, Any]]:
    """Return what options say of each group of a fresh optimizer, the learning rate left out."""
    said = ("betas", "eps", "weight_decay")
    return [{key: group[key] for key in said if key in group} for group in optimizer.param_groups]


@contextmanager
def own_options(optimizer: Any, fresh: list[dict[str, Any]], scheduler: Any) -> Iterator[None]:
    """Let what is restored within stand where this run's options put it at the checkpoint's step.

    A checkpoint brings along the options of the run that saved it. Where they are the same nothing
    changes, to the bit. A schedule that follows from more than the step is left as it was saved.

    Args:
        optimizer: torch's.
        fresh: `hyperparameters` of it when it was made.
        scheduler: of this run, fresh.
    """
    rates = list(scheduler.base_lrs) if isinstance(scheduler, LambdaLR) else []
    yield
    for group, values in zip(optimizer.param_groups, fresh, strict=True):
        group.update(values)
    if rates:
        _take_rates(optimizer, scheduler, rates)


def _take_rates(optimizer: Any, scheduler: LambdaLR, rates: list[Any]) -> None:
    step, saved = scheduler.last_epoch, scheduler.get_last_lr()[0]
    now = [rate * factor(step) for rate, factor in zip(rates, scheduler.lr_lambdas, strict=True)]
    scheduler.base_lrs, scheduler._last_lr = rates, now
    for group, base, rate in zip(optimizer.param_groups, rates, now, strict=True):
        group["initial_lr"] = base
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    if now[0] != saved:
        logger.warning(
            "step %d: learning rate %.3g instead of %.3g, as in a run with these options from its "
            "start", step + 1, now[0], saved,
        )  # fmt: skip


def restore_totals(totals: Totals, state: TrainerState, folder: Path, world_size: int) -> None:
    """Go on counting from a checkpoint's manifest.

    Raises:
        CheckpointError: the run would have ended before.
    """
    if state.global_step > state.max_steps:
        raise CheckpointError(
            f"{folder} is at step {state.global_step}, and the run would end after "
            f"{state.max_steps}: raise --max_steps or --num_train_epochs, or --resume from an "
            "earlier checkpoint"
        )
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


def verified_best(state: TrainerState, output_dir: Path, trusted: bool) -> Path:
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

"""Which checkpoints a run may go on from: those that it can read and that it would continue."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from qwen3_sft.checkpoints.manifest import CheckpointError
from qwen3_sft.options.args import DataArguments
from qwen3_sft.options.recipe import UsageError

logger = logging.getLogger(__name__)

_LAYOUTS = {
    "whole": "one process or DDP",
    "dtensor": "FSDP2 (--fsdp_size or config/fsdp.json)",
    "zero": "DeepSpeed ZeRO",
}
_ANEW = "export it (qwen3-sft export) and start a new run from the export"

# What decides which tokens a step trains. The place in the data is counted in steps, so that with
# another value some tokens would be trained twice or never.
CHANGEABLE = (
    "global_batch_size", "data", "template", "tokenizer", "max_length", "packing", "eval_fraction",
    "seed",
)  # fmt: skip
# What the restored optimizer and schedule bring along, whatever the options say.
_RESTORED = ("learning_rate", "lr_scheduler_type", "weight_decay", "optim")


def run_identity(
    args: Any, data: DataArguments, fingerprints: Mapping[str, str], rows_per_step: int
) -> dict[str, Any]:
    """Return what must not change between a checkpoint and the run that goes on from it.

    Args:
        args: the TrainArguments.
        data: how tokens become rows.
        fingerprints: of `data`, `template` and `tokenizer`, as the data report has them.
        rows_per_step: packed rows of an optimizer step over all processes.
    """
    return {
        "global_batch_size": rows_per_step,
        **fingerprints,
        "max_length": data.max_length,
        "packing": data.packing,
        "eval_fraction": data.eval_fraction,
        "seed": args.seed,
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "weight_decay": args.weight_decay,
        "optim": str(getattr(args.optim, "value", args.optim)),
    }


def check_allowed(names: Collection[str]) -> None:
    """Refuse a name in --allow_change that means nothing.

    Raises:
        UsageError: naming those that do.
    """
    for name in names:
        if name not in CHANGEABLE:
            raise UsageError(f"--allow_change {name}: must be among {', '.join(CHANGEABLE)}")


def check_resumable(
    manifest: Mapping[str, Any],
    layout: str,
    world_size: int,
    folder: Path,
    now: Mapping[str, Any] | None = None,
    allowed: Collection[str] = (),
) -> None:
    """Refuse a checkpoint that this run cannot read, or that it would not go on from.

    Args:
        manifest: of the checkpoint.
        layout: how this run's weights lie.
        world_size: its processes.
        folder: the checkpoint, for the message.
        now: the run's `run_identity`; None does not compare it.
        allowed: fields of it that may differ.

    Raises:
        CheckpointError: saying what it was written with and what to launch instead.
    """
    saved_layout = manifest["layout"]
    if saved_layout != layout:
        raise CheckpointError(
            f"{folder} was saved under {_LAYOUTS[saved_layout]}, this run uses {_LAYOUTS[layout]}: "
            f"launch as before, or {_ANEW}"
        )
    if manifest["save_only_model"]:
        raise CheckpointError(
            f"{folder} was saved with --save_only_model true and holds no optimizer: {_ANEW}, or "
            "set --resume to an older checkpoint that holds one"
        )
    if layout == "zero" and manifest["world_size"] != world_size:
        raise CheckpointError(
            f"{folder} was saved by {manifest['world_size']} processes, there are {world_size}: a "
            "DeepSpeed checkpoint keeps its number; launch as many, or use --fsdp_size, whose "
            "checkpoints load on any"
        )
    if now is not None:
        if "identity" not in manifest:
            raise CheckpointError(f"{folder} does not say what it was trained on: {_ANEW}")
        _check_identity(manifest["identity"], now, folder, allowed)


def _check_identity(
    saved: Mapping[str, Any], now: Mapping[str, Any], folder: Path, allowed: Collection[str]
) -> None:
    changed = {name: (saved[name], now[name]) for name in saved if saved[name] != now[name]}
    words = {name: f"{name} {before} -> {after}" for name, (before, after) in changed.items()}
    if restored := [words[name] for name in _RESTORED if name in changed]:
        raise CheckpointError(
            f"{folder} was saved with other options: {', '.join(restored)}. Optimizer and schedule "
            f"are the checkpoint's, the new values would be ignored: set the old ones, or {_ANEW}"
        )
    refused = [name for name in CHANGEABLE if name in changed and name not in allowed]
    if refused:
        raise CheckpointError(
            f"{folder} was saved by a run that differs: {', '.join(words[n] for n in refused)}. "
            "Its place in the data is a number of steps, so some tokens would be trained twice or "
            f"never. Set what was changed back, or --allow_change {' '.join(refused)}, or {_ANEW}"
        )
    for name in changed:
        logger.warning(
            "%s was saved with another %s, as --allow_change says; the run goes on at the same "
            "step of its new data", folder, words[name],
        )  # fmt: skip

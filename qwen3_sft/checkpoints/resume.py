"""Which checkpoints a run may go on from: those that it can read and that it would continue."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from qwen3_sft.checkpoints.folders import newest_verified, put_back
from qwen3_sft.checkpoints.manifest import read_manifest, verify
from qwen3_sft.checkpoints.trust import check_best, refuse_foreign_code
from qwen3_sft.distributed.engine import Engine
from qwen3_sft.distributed.rank_zero import on_first_rank
from qwen3_sft.errors import CheckpointError, UsageError
from qwen3_sft.options.data_args import DataArguments
from qwen3_sft.options.train_args import TrainArguments
from qwen3_sft.records.run_folder import RunFolder

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


def check_resume(run: RunFolder, resume: str) -> None:
    """Find a mistake in `--resume` before anything expensive begins.

    Raises:
        UsageError: `never` with a used folder, or a path that is no folder.
    """
    if resume not in ("auto", "never") and not Path(resume).is_dir():
        raise UsageError(f"--resume {resume}: no such folder (or `auto`, or `never`)")
    # Rank 0 decides: it may have begun to write by the time others look.
    if resume != "never" or int(os.environ.get("RANK", "0")):
        return
    used = [p.name for p in run.path.iterdir()] if run.path.is_dir() else []
    if used:
        raise UsageError(
            f"--resume never: {run.path} is not empty ({', '.join(sorted(used)[:4])}); choose "
            "another --output_dir or leave --resume at auto"
        )


def choose_checkpoint(run: RunFolder, resume: str) -> Path | None:
    """Return the checkpoint to resume from, None for a fresh start.

    Args:
        run: the folder.
        resume: `auto`, `never` or a checkpoint's path.

    Raises:
        CheckpointError: the named checkpoint is damaged.
    """
    if resume == "never":
        return None
    if resume != "auto":
        verify(Path(resume))
        return Path(resume)
    put_back(run.path)
    checkpoint, passed_over = newest_verified(run.path)
    for reason in passed_over:
        logger.warning("passed over a checkpoint: %s", reason)
    return checkpoint


def agree_on_checkpoint(
    folder: RunFolder, args: TrainArguments, engine: Engine, identity: dict[str, Any]
) -> Path | None:
    """Let rank 0 read and hash the checkpoints; every rank resumes from what it chose.

    Raises:
        UsageError: the named checkpoint does not exist.
        CheckpointError: it is damaged, loading it might run code, this engine or number of
            processes cannot read it, or the run differs from the one that saved it.
    """

    def choose() -> Path | None:
        checkpoint = choose_checkpoint(folder, args.resume)
        if checkpoint is None:
            return None
        refuse_foreign_code(checkpoint, trusted=args.trust_checkpoint)
        if args.load_best_model_at_end:
            check_best(checkpoint, folder.path)
        check_resumable(
            read_manifest(checkpoint), engine.layout, args.world_size, checkpoint, identity,
            args.allow_change,
        )  # fmt: skip
        return checkpoint.absolute()  # another node may stand in another folder

    return on_first_rank(choose)

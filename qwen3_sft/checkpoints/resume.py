"""Which checkpoints a run may go on from: those that it can read and that it would continue."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from qwen3_sft.checkpoints.folders import checkpoints, newest_verified, put_back
from qwen3_sft.checkpoints.manifest import MANIFEST, read_manifest, verify
from qwen3_sft.checkpoints.trust import check_best, refuse_foreign_code
from qwen3_sft.distributed.engine import Engine
from qwen3_sft.distributed.rank_zero import on_first_rank
from qwen3_sft.errors import CheckpointError, UsageError
from qwen3_sft.options.changes import OPTIONS, comparable, in_words, length
from qwen3_sft.options.recipe import Options
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
_DATA = (
    "global_batch_size", "data", "template", "tokenizer", "max_length", "packing", "eval_fraction",
    "seed",
)  # fmt: skip
_SCHEDULE, _UPDATE = OPTIONS["schedule"], OPTIONS["update"]
CHANGEABLE = (*_DATA, *_SCHEDULE, *_UPDATE)
# Their state is no function of the step.
_STATEFUL = ("reduce_lr_on_plateau", "greedy")
# What weights and states of a checkpoint are made of.
_FIXED = ("base", "dtype", "optim", "optim_args", "optim_target_modules", "optimizer_in_backward")


def run_identity(
    options: Options, fingerprints: Mapping[str, str], base: str, weights: str, rows_per_step: int
) -> dict[str, Any]:
    """Return what a checkpoint says of the run that wrote it, to be compared with one that goes on.

    Args:
        options: of the run, completed.
        fingerprints: of `data`, `template` and `tokenizer`, as the data report has them.
        base: fingerprint of the base model.
        weights: dtype of the trained weights.
        rows_per_step: packed rows of an optimizer step over all processes.
    """
    values = comparable(options.values())
    rounding = "bf16_stochastic_round"  # not part of the states, and not for shards
    pairs = (values["optim_args"] or "").replace(" ", "").split(",")
    values["optim_args"] = ",".join(pair for pair in pairs if not pair.startswith(rounding))
    return {
        **{name: values[name] for name in (*CHANGEABLE, *_FIXED) if name in values},
        **length(options.values()),
        **fingerprints,
        "global_batch_size": rows_per_step,
        "base": base,
        "dtype": weights,
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
        allowed: fields of it that may differ (`--allow_change`); its length may in any case.

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
    # What an earlier version did not record cannot be compared.
    words = {
        name: in_words(name, before, now[name])
        for name, before in saved.items()
        if name in now and before != now[name]
    }
    if fixed := [words[name] for name in _FIXED if name in words]:
        raise CheckpointError(
            f"{folder} was saved with other options: {', '.join(fixed)}. Its weights and optimizer "
            f"states are made of the old ones: set them back, or {_ANEW}"
        )
    _check_schedule(saved, now, words, folder)
    _check_allowed_changes(words, folder, allowed)
    for name in words:
        logger.warning("%s was saved with another %s; %s", folder, words[name], _effect(name))


def _check_schedule(
    saved: Mapping[str, Any], now: Mapping[str, Any], words: Mapping[str, str], folder: Path
) -> None:
    """Refuse another schedule where the learning rate follows from more than the step's number."""
    changes = [words[name] for name in (*_SCHEDULE, *OPTIONS["length"]) if name in words]
    kinds = {str(identity.get("lr_scheduler_type")) for identity in (saved, now)}
    if changes and (stateful := kinds.intersection(_STATEFUL)):
        raise CheckpointError(
            f"{folder}: {', '.join(changes)}, and with --lr_scheduler_type {min(stateful)} the "
            f"learning rate follows from all steps before: set it back, or {_ANEW}"
        )


def _check_allowed_changes(
    words: Mapping[str, str], folder: Path, allowed: Collection[str]
) -> None:
    refused = [name for name in CHANGEABLE if name in words and name not in allowed]
    if refused:
        effects = dict.fromkeys(_effect(name) for name in refused)
        raise CheckpointError(
            f"{folder} was saved by a run that differs: {', '.join(words[n] for n in refused)}. "
            f"Set what was changed back, or {_ANEW}, or --allow_change {' '.join(refused)}: "
            f"{', and '.join(effects)}"
        )


def _effect(name: str) -> str:
    """Return what a changed value does to a run that goes on."""
    if name in _DATA:
        return (
            "the run goes on at the same step of its new data, so that some tokens are trained "
            "twice or never"
        )
    if name in _UPDATE:
        return f"{name} counts from the next step on"
    return "from the next step on the learning rate is that of a run with the new values throughout"


def check_resume(run: RunFolder, resume: str) -> None:
    """Find a mistake in `--resume` before anything expensive begins.

    Raises:
        UsageError: `never` with a used folder, or a path that is no checkpoint.
    """
    if resume not in ("auto", "never"):
        _require_checkpoint(Path(resume))
    # Rank 0 decides: it may have begun to write by the time others look.
    if resume != "never" or int(os.environ.get("RANK", "0")):
        return
    used = [p.name for p in run.path.iterdir()] if run.path.is_dir() else []
    if used:
        raise UsageError(
            f"--resume never: {run.path} is not empty ({', '.join(sorted(used)[:4])}); choose "
            "another --output_dir or leave --resume at auto"
        )


def _require_checkpoint(folder: Path) -> None:
    if not folder.is_dir():
        raise UsageError(f"--resume {folder}: no such folder (or `auto`, or `never`)")
    if not (folder / MANIFEST).is_file():
        inside = checkpoints(folder)
        newest = f"; its newest is {inside[-1]}" if inside else ""
        raise UsageError(f"--resume {folder}: no checkpoint (it has no {MANIFEST}){newest}")


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
            if folder.summary() is not None:
                raise CheckpointError(
                    f"{folder.path} holds a finished run and no whole checkpoint to go on from: "
                    f"train {folder.model} in another --output_dir"
                )
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

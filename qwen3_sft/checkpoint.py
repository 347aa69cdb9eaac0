"""Checkpoints that are whole or absent, and a resume that restores everything.

Two faults of the stock Trainer are mended here. It saves experts one by one (hub names) but loads
with `strict=False` into fused tensors, so that a resumed run silently continues with the base
model's experts (transformers issue 48805). And it writes in place, so that a killed save leaves a
folder which looks like the newest checkpoint. A checkpoint is therefore written aside, sealed with
`manifest.json` (every file, its size and hash) and renamed; loading goes through the same
conversion as `from_pretrained` and refuses any missing or unexpected weight.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from qwen3_sft.model import load_strict

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_LAYOUTS = {
    "whole": "one process or DDP",
    "dtensor": "FSDP2 (--fsdp_size or config/fsdp.json)",
    "zero": "DeepSpeed ZeRO",
}


class CheckpointError(RuntimeError):
    """A checkpoint is incomplete, damaged or does not fit; the message names the file."""


def seal(folder: Path, **facts: Any) -> None:
    """Write the manifest: `files` with size and xxh3 hash, plus `facts`; then flush it to disk."""
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "xxh3": _hash(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump({**facts, "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def verify(folder: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint whose files are all there and unchanged.

    Raises:
        CheckpointError: naming the first file that is missing, short or altered.
    """
    manifest = read_manifest(folder)
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing")
        if path.stat().st_size != expected["bytes"]:
            raise CheckpointError(
                f"{path}: {path.stat().st_size} bytes, the manifest says {expected['bytes']}"
            )
        if _hash(path) != expected["xxh3"]:
            raise CheckpointError(f"{path}: content differs from what was saved")
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest without looking at the files that it lists.

    Raises:
        CheckpointError: there is none.
    """
    manifest_file = folder / MANIFEST
    if not manifest_file.is_file():
        raise CheckpointError(f"{folder}: no {MANIFEST}; the save did not finish")
    return json.loads(manifest_file.read_text(encoding="utf-8"))


def newest_verified(output_dir: Path) -> tuple[Path | None, list[str]]:
    """Return the newest whole checkpoint and why newer ones were passed over."""
    folders = [p for p in output_dir.glob("checkpoint-*") if p.is_dir() and _NAME.fullmatch(p.name)]
    passed_over = []
    for folder in sorted(folders, key=step_of, reverse=True):
        logger.info("verifying %s", folder)
        try:
            verify(folder)
        except (CheckpointError, json.JSONDecodeError, KeyError) as error:
            passed_over.append(str(error))
        else:
            return folder, passed_over
    return None, passed_over


def step_of(folder: Path) -> int:
    """Return N of `checkpoint-N`."""
    match = _NAME.fullmatch(folder.name)
    if match is None:
        raise CheckpointError(f"{folder}: not named checkpoint-N")
    return int(match.group(1))


def publish(staged: Path, final: Path) -> None:
    """Move a sealed folder to its final name in one step; an unsealed namesake is replaced."""
    if final.exists():
        shutil.rmtree(final)
    for path in staged.rglob("*"):
        _sync(path)
    staged.rename(final)
    _sync(final.parent)


def load_weights(model: PreTrainedModel, folder: Path) -> None:
    """Put a saved checkpoint's weights into a live (patched) model, strictly.

    The hub's per-expert names are merged into the live fused tensors by the same conversion that
    `from_pretrained` uses.

    Raises:
        ModelError: the files miss a weight, or have one too many.
        CheckpointError: the live model has other parameters than the files.
    """
    saved = load_strict(folder, dtype=next(model.parameters()).dtype).state_dict()
    load_whole_state(model, saved, folder)


def load_whole_state(model: PreTrainedModel, saved: dict[str, Tensor], folder: Path) -> None:
    """Copy the whole tensors read from `folder` into a model that must have the same names.

    Raises:
        CheckpointError: it has others.
    """
    live = model.state_dict()
    if saved.keys() != live.keys():
        differing = sorted(saved.keys() ^ live.keys())
        raise CheckpointError(f"{folder}: the live model differs in {', '.join(differing[:5])}")
    model.load_state_dict(saved, strict=True)


def refuse_non_finite(model: torch.nn.Module, step: int) -> None:
    """Raise on all ranks before a NaN or Inf weight can replace a good checkpoint.

    Raises:
        CheckpointError: naming the first such parameter.
    """
    parts = {name: local_part(p) for name, p in model.named_parameters()}
    is_finite = torch.stack([torch.isfinite(part).all() for part in parts.values()]).int()
    if dist.is_initialized():
        dist.all_reduce(is_finite, op=dist.ReduceOp.MIN)
    if not is_finite.all():
        bad = list(parts)[int(is_finite.argmin())]
        raise CheckpointError(f"step {step}: {bad} holds NaN or Inf; no checkpoint was written")


def local_part(parameter: Tensor) -> Tensor:
    """Return what this process holds of a parameter: its shard of a DTensor or ZeRO-3's, or all."""
    if isinstance(parameter, DTensor):
        return parameter.to_local()
    return getattr(parameter, "ds_tensor", parameter)  # DeepSpeed's name for its partition


def check_resumable(
    manifest: dict[str, Any],
    layout: str,
    world_size: int,
    folder: Path,
    rows_per_step: int | None = None,
) -> None:
    """Refuse a checkpoint that this run cannot read, or that it would not go on from.

    Args:
        manifest: of the checkpoint.
        layout: how this run's weights lie.
        world_size: its processes.
        folder: the checkpoint, for the message.
        rows_per_step: packed rows of its steps. The position in the data and in the learning rate
            schedule is counted in steps. None does not look.

    Raises:
        CheckpointError: saying what it was written with and what to launch instead.
    """
    anew = "export it (qwen3-sft export) and start a new run from the export"
    saved_layout = manifest.get("layout", "whole")
    if saved_layout != layout:
        raise CheckpointError(
            f"{folder} was saved under {_LAYOUTS[saved_layout]}, this run uses {_LAYOUTS[layout]}: "
            f"launch as before, or {anew}"
        )
    if manifest.get("save_only_model", False):
        raise CheckpointError(
            f"{folder} was saved with --save_only_model true and holds no optimizer: {anew}, or "
            "set --resume to an older checkpoint that holds one"
        )
    if layout == "zero" and manifest["world_size"] != world_size:
        raise CheckpointError(
            f"{folder} was saved by {manifest['world_size']} processes, there are {world_size}: a "
            "DeepSpeed checkpoint keeps its number; launch as many, or use --fsdp_size, whose "
            "checkpoints load on any"
        )
    saved_rows = manifest.get("rows_per_step", rows_per_step)
    if rows_per_step is not None and saved_rows != rows_per_step:
        raise CheckpointError(
            f"{folder} was saved after steps of {saved_rows} rows, this run's have "
            f"{rows_per_step}: some rows would be trained twice or never. Set --global_batch_size "
            f"{saved_rows}, or {anew}"
        )


def _hash(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Checkpoints that are whole or absent, and a resume that restores everything.

Two faults of the stock Trainer are mended here. It saves experts one by one (hub names) but loads
with `strict=False` into fused tensors, so that a resumed run silently continues with the base
model's experts (transformers issue 48805). And it writes in place, so that a killed save leaves a
folder which looks like the newest checkpoint. A checkpoint is therefore written aside, sealed with
`manifest.json` (every file, its size and hash) and renamed; loading goes through the same
conversion as `from_pretrained` and refuses any missing or unexpected weight.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from qwen3_sft.checkpoints.held_state import model_tensors, optimizer_tensors, plain_tensors
from qwen3_sft.checkpoints.manifest import CheckpointError, verify
from qwen3_sft.model.loading import load_strict

logger = logging.getLogger(__name__)

STAGING = ".saving"

_NAME = re.compile(r"checkpoint-(\d+)")
# Folders on their way out; the rest of their name is the one they had.
_REPLACED, _REMOVED = ".replaced-", ".removed-"
_SLICE = 1 << 26  # elements of a float8 tensor that are looked at together


def newest_verified(output_dir: Path) -> tuple[Path | None, list[str]]:
    """Return the newest whole checkpoint and why newer ones were passed over."""
    _put_back(output_dir)
    passed_over = []
    for folder in reversed(checkpoints(output_dir)):
        logger.info("verifying %s", folder)
        try:
            verify(folder)
        except CheckpointError as error:
            passed_over.append(str(error))
        else:
            return folder, passed_over
    return None, passed_over


def checkpoints(output_dir: Path) -> list[Path]:
    """Return the folders named checkpoint-N, whole or not, by step."""
    folders = [p for p in output_dir.glob("checkpoint-*") if p.is_dir() and _NAME.fullmatch(p.name)]
    return sorted(folders, key=step_of)


def step_of(folder: Path) -> int:
    """Return N of `checkpoint-N`."""
    match = _NAME.fullmatch(folder.name)
    if match is None:
        raise CheckpointError(f"{folder}: not named checkpoint-N")
    return int(match.group(1))


def publish(staged: Path, final: Path) -> None:
    """Give a sealed folder its final name; one that has it already is removed afterwards.

    Whoever is killed in between leaves the old folder or the new one: the old one is renamed, and
    if the new one did not come, `newest_verified` and the next save put it back.
    """
    replaced = final.with_name(_REPLACED + final.name)
    for path in (*staged.rglob("*"), staged):
        _sync(path)
    if final.exists():
        if replaced.exists():
            shutil.rmtree(replaced)
        os.rename(final, replaced)
    os.rename(staged, final)
    _sync(final.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def remove(folder: Path) -> None:
    """Remove a checkpoint; one that is removed by half does not look like one.

    Raises:
        OSError: it cannot be removed.
    """
    removed = folder.with_name(_REMOVED + folder.name)
    if removed.exists():
        shutil.rmtree(removed)
    os.rename(folder, removed)
    shutil.rmtree(removed)


def clear_leftovers(output_dir: Path) -> None:
    """Remove what saves and removals have left that were killed.

    Raises:
        OSError: it cannot be removed.
    """
    _put_back(output_dir)
    for pattern in (STAGING, f"{_REPLACED}*", f"{_REMOVED}*"):
        for path in list(output_dir.glob(pattern)):
            shutil.rmtree(path)


def _put_back(output_dir: Path) -> None:
    """Finish what `publish` did not: between its renames nothing has the final name."""
    for replaced in list(output_dir.glob(f"{_REPLACED}*")):
        final = output_dir / replaced.name.removeprefix(_REPLACED)
        if not final.exists():
            logger.warning("%s was being replaced when the run ended; it is put back", final)
            os.rename(replaced, final)


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


def refuse_non_finite(
    model: nn.Module, step: int, optimizer: Any = None, device: torch.device | str = "cpu"
) -> None:
    """Raise on all ranks before a NaN or Inf can replace a good checkpoint; collective.

    One pass over parameters, buffers and optimizer states, without a temporary of their size, and
    one question to the device.

    Args:
        model: unwrapped, held by any engine.
        step: for the message.
        optimizer: None if it is not saved.
        device: of the process group's collectives.

    Raises:
        CheckpointError: naming the first such tensor, and the rank if there are several.
    """
    held = [*model_tensors(model)]
    if optimizer is not None:
        held += optimizer_tensors(model, optimizer)
    names, flags = defaultdict[torch.device, list[str]](list), defaultdict(list)
    for name, tensor in held:
        for part in plain_tensors(tensor):
            if part.is_floating_point() and part.numel():
                names[part.device].append(name)
                flags[part.device].append(_is_finite(part))
    found = {place: torch.stack(flags[place]) for place in flags}
    is_finite = torch.ones((), dtype=torch.int32, device=device)
    for flag in found.values():
        is_finite *= flag.all().to(device)
    if dist.is_initialized():
        dist.all_reduce(is_finite, op=dist.ReduceOp.MIN)
    if not is_finite:
        bad = [names[place][int(i)] for place in found for i in (~found[place]).nonzero()]
        raise CheckpointError(
            f"step {step}: {_first(bad)} holds NaN or Inf; no checkpoint was written"
        )


def _is_finite(part: Tensor) -> Tensor:
    """Return a 0-dim bool: the least and the greatest element are NaN if any is."""
    slices = [part]
    if part.element_size() == 1:  # torch has no minimum of float8
        slices = [piece.bfloat16() for piece in part.flatten().split(_SLICE)]
    extremes = torch.stack([torch.stack(torch.aminmax(piece)) for piece in slices])
    return extremes.isfinite().all()


def _first(bad: list[str]) -> str:
    """Return the first name of all ranks' lists; collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return bad[0]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, bad[:1])
    rank = next(rank for rank, names in enumerate(every) if names)
    return f"rank {rank}: {every[rank][0]}"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""A NaN or Inf is found before it can replace a good checkpoint."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qwen3_sft.checkpoints.state_tensors import model_tensors, optimizer_tensors, plain_tensors
from qwen3_sft.errors import CheckpointError

_SLICE = 1 << 26  # elements of a float8 tensor that are looked at together


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

"""How much a checkpoint takes, known before its first byte is written."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qwen3_sft.checkpoints.state_tensors import model_tensors, optimizer_tensors, plain_tensors
from qwen3_sft.distributed.rank_zero import process_rank
from qwen3_sft.errors import CheckpointError

# Beyond the tensors: headers and padding; tokenizer, schedules, random states.
_SHARE, _BYTES = 1.02, 64 << 20


def bytes_to_save(
    model: nn.Module, optimizer: Any, layout: str, device: torch.device | str = "cpu"
) -> int:
    """Return about how many bytes a checkpoint of all processes takes, rather more; collective.

    Args:
        model: unwrapped, held by any engine.
        optimizer: None if it is not saved. What has no states before its first step counts so.
        layout: of the engine.
        device: of the process group's collectives.
    """
    share = sum(_bytes(tensor) * _share(tensor) for _, tensor in model_tensors(model))
    if optimizer is not None:
        for _, tensor in optimizer_tensors(model, optimizer):
            # DeepSpeed's optimizer states are parts; elsewhere only DTensors are.
            share += _bytes(tensor) * (1 if layout == "zero" else _share(tensor))
    total = torch.tensor(share, dtype=torch.float64).to(device)
    if dist.is_initialized():
        dist.all_reduce(total)
    return int(total.item() * _SHARE) + _BYTES


def refuse_full_disk(folder: Path, needed: int) -> None:
    """Raise before a save that will not find its room.

    Raises:
        CheckpointError: with the bytes needed and free.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"a checkpoint takes about {needed} bytes and {folder} has {free} bytes free; nothing "
            "was written, earlier checkpoints are whole. Free some space, keep fewer with "
            "--save_total_limit 1, or resume with another --output_dir"
        )


def _bytes(tensor: Tensor) -> int:
    return sum(part.numel() * part.element_size() for part in plain_tensors(tensor))


def _share(tensor: Tensor) -> float:
    """Return which part of what lies here this process writes."""
    if isinstance(tensor, DTensor):
        sizes = zip(tensor.placements, tensor.device_mesh.shape, strict=True)
        return 1 / math.prod(size for placement, size in sizes if placement.is_replicate())
    if getattr(tensor, "ds_tensor", None) is not None:
        return 0.0  # ZeRO-3 writes the optimizer's float32 weights instead
    return float(process_rank() == 0)

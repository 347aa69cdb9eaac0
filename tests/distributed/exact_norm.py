"""Gradient norms summed in float64, so that engines can be compared closer than float32 sums allow.

Torch's float32 norm of a whole tensor on a CPU is off by up to 1e-5 (65,536 normal values: 6e-7; a
524,288-element tensor with a heavy tail: 1.6e-5, torch 2.13), that of two halves by half as much.
Sharded and whole gradients therefore differ in the sixth digit although every element agrees.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.utils import clip_grad


def sum_in_float64() -> None:
    """Let `clip_grad_norm_` and `get_total_norm` of this process sum in float64."""
    original = clip_grad._get_total_norm

    def exact(tensors: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        tensors = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
        return original([t.double() for t in tensors], *args, **kwargs).float()

    clip_grad._get_total_norm = exact
    torch.nn.utils.get_total_norm = exact

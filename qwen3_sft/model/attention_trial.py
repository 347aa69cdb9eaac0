"""Attention kernels of packages: switched on, and tried on a few tokens before a run trusts them.

FlashAttention 3 and 4 run below torch's variable-length attention, where torch's registry puts them
(`torch.nn.attention.activate_flash_attention_impl`): one operator whatever the kernel, which
selective checkpointing can name. Called by themselves, version 4 has no operator at all, and
version 3's is wrapped by another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl

from monkey_patch.kernels.varlen_attention.flash_attention_4 import adapt_flash_attention_4
from monkey_patch.kernels.varlen_attention.op import varlen_attention
from monkey_patch.kernels.varlen_attention.reference import varlen_attention_reference

# What torch's registry calls them.
IMPLEMENTATIONS = {"flash_attention_3": "FA3", "flash_attention_4": "FA4"}
# What runs as torch's variable-length attention.
VARLEN = ("torch_varlen", *IMPLEMENTATIONS)
_HEADS, _GROUPS, _ENDS = 4, 2, (0, 5, 5, 133, 192)
_TOLERANCE = 0.03  # of the largest value, in bfloat16


def switch_on(name: str) -> None:
    """Have torch's variable-length attention run a package's kernels, if it is one of those.

    Raises:
        ImportError: the package is not there, or RuntimeError: it lacks what torch calls.
    """
    if name == "flash_attention_4":
        adapt_flash_attention_4()
    if name in IMPLEMENTATIONS:
        activate_flash_attention_impl(IMPLEMENTATIONS[name])


@contextmanager
def switched_on(name: str) -> Iterator[None]:
    """Switch a package's kernels on inside."""
    switch_on(name)
    try:
        yield
    finally:
        if name in IMPLEMENTATIONS:
            restore_flash_attention_impl(_raise_warn=False)


def trial(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Compute a few packed documents, forward and backward, and compare with the definition.

    Args:
        name: `torch_varlen` or a package's kernels.
        device: of the run.
        dtype: of queries, keys and values.
        head_dim: channels of a head.

    Returns:
        What is wrong, None if nothing is.
    """
    try:
        with switched_on(name):
            found = _gradients(_attend(name), device, dtype, head_dim)
    except Exception as error:  # a package of kernels raises whatever it likes
        return f"{type(error).__name__}: {str(error).strip() or 'no message'}"
    expected = _gradients(_defined, torch.device("cpu"), torch.float64, head_dim)
    for what, got, right in zip(("output", "dq", "dk", "dv"), found, expected, strict=True):
        error = (got.cpu().double() - right).abs().max() / right.abs().max()
        if not error < _TOLERANCE:
            return f"its {what} is off by {error:.2g} of the largest value"
    return None


_Attend = Callable[[Tensor, Tensor, Tensor, Tensor, int, float], Tensor]


def _attend(name: str) -> _Attend:
    if name != "flash_attention_2":
        return varlen_attention
    flash_attn: Any = import_module("flash_attn")

    def attend(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int, scale: float) -> Tensor:
        rows = (t.transpose(0, 1) for t in (q, k, v))
        out: Tensor = flash_attn.flash_attn_varlen_func(
            *rows, ends, ends, longest, longest, softmax_scale=scale, causal=True
        )
        return out

    return attend


def _defined(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, _: int, scale: float) -> Tensor:
    return varlen_attention_reference(q, k, v, ends, scale)


def _gradients(
    attend: _Attend, device: torch.device, dtype: torch.dtype, head_dim: int
) -> tuple[Tensor, ...]:
    """Return output and gradients of a few documents, one of them empty, one longer than a tile."""
    generator = torch.Generator().manual_seed(0)

    def values(heads: int) -> Tensor:
        # Rounded once, so that every dtype begins with the same numbers.
        drawn = torch.randn(heads, _ENDS[-1], head_dim, generator=generator).bfloat16()
        return drawn.to(device, dtype).requires_grad_()

    q, k, v = values(_HEADS), values(_GROUPS), values(_GROUPS)
    ends = torch.tensor(_ENDS, dtype=torch.int32, device=device)
    out = attend(q, k, v, ends, max(_ENDS), head_dim**-0.5)
    out.backward(torch.ones_like(out))
    grads = (tensor.grad for tensor in (q, k, v))
    return (out.detach(), *(grad for grad in grads if grad is not None))

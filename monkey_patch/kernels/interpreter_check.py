"""A product of ones in bfloat16, which Triton's interpreter gets wrong up to 3.7.1."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

_SIZE = 16


@triton.jit
def _product(ones_ptr, out_ptr, SIZE: tl.constexpr):
    row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    ones = tl.load(ones_ptr + row * SIZE + column)
    tl.store(out_ptr + row * SIZE + column, tl.dot(ones, ones))


def product_of_ones() -> bool:
    """Return whether the interpreter multiplies bfloat16 right; Triton must be interpreting."""
    ones = torch.ones(_SIZE, _SIZE, dtype=torch.bfloat16)
    out = torch.empty(_SIZE, _SIZE)
    kernel: Any = _product
    kernel[(1,)](ones, out, SIZE=_SIZE)
    return bool((out == _SIZE).all())

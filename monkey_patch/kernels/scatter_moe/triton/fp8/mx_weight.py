"""Quantise the weights of all experts in blocks of 32 along the contraction of each product.

A product with W and one with W.T contract over different dimensions, so that a weight has two sets
of values. Where a pass needs both, one read of the weight makes them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from monkey_patch.kernels.launch import Launch, cdiv
from monkey_patch.kernels.scatter_moe.quantize import QuantizedWeight
from monkey_patch.kernels.scatter_moe.triton.fp8.scaling import as_pointer, quantize_tile

_SIDE = 64


@triton.jit
def _quantize_mx_weight_kernel(
    w_ptr,
    values_ptr,
    scales_ptr,
    transposed_ptr,
    transposed_scales_ptr,
    M: tl.constexpr,
    K: tl.constexpr,
    FORWARD: tl.constexpr,
    BACKWARD: tl.constexpr,
    SIDE: tl.constexpr,
):
    """Quantise a square of one expert's (M, K) weight along K, along M and turned, or both."""
    TALL: tl.constexpr = (M + SIDE - 1) // SIDE
    WIDE: tl.constexpr = (K + SIDE - 1) // SIDE
    expert = (tl.program_id(0) // (TALL * WIDE)).to(tl.int64)
    m = (tl.program_id(0) // WIDE % TALL) * SIDE
    k = (tl.program_id(0) % WIDE) * SIDE
    ms = (m + tl.arange(0, SIDE))[:, None]
    ks = (k + tl.arange(0, SIDE))[None, :]
    mask = (ms < M) & (ks < K)
    places = expert * (M * K) + ms * K + ks
    w = tl.load(w_ptr + places, mask=mask, other=0.0).to(tl.float32)
    if FORWARD:
        _store_rows(w, expert, m, k, values_ptr, scales_ptr, M, K)
    if BACKWARD:
        _store_rows(w.trans(), expert, k, m, transposed_ptr, transposed_scales_ptr, K, M)


@triton.jit
def _store_rows(
    w, expert, row, column, values_ptr, scales_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Quantise a square, at a row and a column of one expert's (ROWS, COLUMNS), along its rows."""
    SIDE: tl.constexpr = w.shape[0]
    BLOCKS: tl.constexpr = SIDE // 32
    SCALES: tl.constexpr = (COLUMNS + 31) // 32
    values, scales = quantize_tile(w.reshape(SIDE * BLOCKS, 32), True)
    rows = (row + tl.arange(0, SIDE))[:, None]
    columns = (column + tl.arange(0, SIDE))[None, :]
    mask = (rows < ROWS) & (columns < COLUMNS)
    values_ptr += expert * (ROWS * COLUMNS)
    tl.store(values_ptr + rows * COLUMNS + columns, values.reshape(SIDE, SIDE), mask=mask)
    blocks = (column // 32 + tl.arange(0, BLOCKS))[None, :]
    mask = (rows < ROWS) & (blocks < SCALES)
    scales_ptr += expert * (ROWS * SCALES)
    tl.store(scales_ptr + rows * SCALES + blocks, scales.reshape(SIDE, BLOCKS), mask=mask)


def mx_weight_launch(w_EMK: torch.Tensor, out: QuantizedWeight) -> Launch:
    """Return the launch that quantises a weight.

    Args:
        w_EMK: (E, M, K) bfloat16, float16 or float32, contiguous.
        out: what to fill, one layout or both.
    """
    experts, rows, depth = w_EMK.shape
    # A pointer that is not written through is any.
    forward, backward = out.forward or (w_EMK, w_EMK), out.backward or (w_EMK, w_EMK)
    return Launch(
        _quantize_mx_weight_kernel,
        experts * cdiv(rows, _SIDE) * cdiv(depth, _SIDE),
        {
            "w_ptr": w_EMK,
            "values_ptr": forward[0],
            "scales_ptr": as_pointer(forward[1]),
            "transposed_ptr": backward[0],
            "transposed_scales_ptr": as_pointer(backward[1]),
            "M": rows,
            "K": depth,
            "FORWARD": out.forward is not None,
            "BACKWARD": out.backward is not None,
            "SIDE": _SIDE,
        },
    )

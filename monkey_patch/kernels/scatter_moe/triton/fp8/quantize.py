"""Quantise rows and the weights of all experts, bit for bit as `scatter_moe/quantize.py` says."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from monkey_patch.kernels.launch import Launch, cdiv, next_power_of_2
from monkey_patch.kernels.scatter_moe.quantize import (
    BLOCK,
    E4M3,
    Quantized,
    QuantizedRows,
    QuantizedWeight,
    Scaling,
    block_height,
    block_width,
    scale_dtype,
)
from monkey_patch.kernels.scatter_moe.triton.fp8.mx_weight import mx_weight_launch
from monkey_patch.kernels.scatter_moe.triton.fp8.scaling import (
    as_pointer,
    largest_bits,
    quantize_tile,
    scale_of,
    to_e4m3,
)

# Values of one program: 32 per thread of four warps.
_TILE = 4096
_ROW = 2048


@triton.jit(do_not_specialize=["num_rows"])
def _quantize_rows_kernel(
    x_ptr,
    values_ptr,
    scales_ptr,
    num_rows,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    MX: tl.constexpr,
):
    """Quantise ROWS rows of BLOCKS blocks of WIDTH values."""
    COLUMN_TILES: tl.constexpr = (K + BLOCKS * WIDTH - 1) // (BLOCKS * WIDTH)
    SCALES: tl.constexpr = (K + WIDTH - 1) // WIDTH
    block = (tl.program_id(0) % COLUMN_TILES) * BLOCKS
    rows = (tl.program_id(0) // COLUMN_TILES).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = (rows < num_rows)[:, None]
    columns = (block * WIDTH + tl.arange(0, BLOCKS * WIDTH))[None, :]
    mask = is_row & (columns < K)
    places = rows[:, None] * K + columns
    x = tl.load(x_ptr + places, mask=mask, other=0.0).to(tl.float32)
    values, scales = quantize_tile(x.reshape(ROWS * BLOCKS, WIDTH), MX)
    tl.store(values_ptr + places, values.reshape(ROWS, BLOCKS * WIDTH), mask=mask)
    blocks = (block + tl.arange(0, BLOCKS))[None, :]
    scale_ptrs = scales_ptr + rows[:, None] * SCALES + blocks
    tl.store(scale_ptrs, scales.reshape(ROWS, BLOCKS), mask=is_row & (blocks < SCALES))


@triton.jit
def _quantize_squares_kernel(
    w_ptr,
    values_ptr,
    scales_ptr,
    transposed_ptr,
    transposed_scales_ptr,
    M: tl.constexpr,
    K: tl.constexpr,
    FORWARD: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Quantise one square of one expert's (M, K) weight, and store it upright, turned, or both."""
    TALL: tl.constexpr = (M + BLOCK - 1) // BLOCK
    WIDE: tl.constexpr = (K + BLOCK - 1) // BLOCK
    expert = tl.program_id(0) // (TALL * WIDE)
    block_m = tl.program_id(0) // WIDE % TALL
    block_k = tl.program_id(0) % WIDE
    ms = (block_m * BLOCK + tl.arange(0, BLOCK))[:, None]
    ks = (block_k * BLOCK + tl.arange(0, BLOCK))[None, :]
    start = expert.to(tl.int64) * (M * K)
    mask = (ms < M) & (ks < K)
    w = tl.load(w_ptr + start + ms * K + ks, mask=mask, other=0.0).to(tl.float32)
    scale = scale_of(tl.max(largest_bits(w, 1), 0))
    values = to_e4m3(w, scale)
    first_scale = expert * (TALL * WIDE)
    if FORWARD:
        tl.store(values_ptr + start + ms * K + ks, values, mask=mask)
        tl.store(scales_ptr + first_scale + block_m * WIDE + block_k, scale)
    if BACKWARD:
        places = start + ks.trans() * M + ms.trans()
        tl.store(transposed_ptr + places, values.trans(), mask=mask.trans())
        tl.store(transposed_scales_ptr + first_scale + block_k * TALL + block_m, scale)


@triton.jit
def _quantize_columns_kernel(
    w_ptr,
    transposed_ptr,
    scales_ptr,
    M: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Quantise columns of one expert's (M, K) weight, a scale for each, and store them as rows."""
    COLUMN_TILES: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    expert = tl.program_id(0) // COLUMN_TILES
    ks = (tl.program_id(0) % COLUMN_TILES) * BLOCK_K + tl.arange(0, BLOCK_K)
    start = expert.to(tl.int64) * (M * K)
    bits = tl.zeros((BLOCK_K,), tl.int32)
    for m in range(0, M, BLOCK_M):
        ms = m + tl.arange(0, BLOCK_M)[:, None]
        mask = (ms < M) & (ks < K)[None, :]
        w = tl.load(w_ptr + start + ms * K + ks[None, :], mask=mask, other=0.0).to(tl.float32)
        bits = tl.maximum(bits, largest_bits(w, 0))
    scale = scale_of(bits)
    tl.store(scales_ptr + expert * K + ks, scale, mask=ks < K)
    for m in range(0, M, BLOCK_M):
        ms = m + tl.arange(0, BLOCK_M)[:, None]
        mask = (ms < M) & (ks < K)[None, :]
        w = tl.load(w_ptr + start + ms * K + ks[None, :], mask=mask, other=0.0).to(tl.float32)
        values = to_e4m3(w, scale[None, :]).trans()
        places = start + ks[:, None] * M + ms.trans()
        tl.store(transposed_ptr + places, values, mask=mask.trans())


def quantize_rows_launch(x_MK: torch.Tensor, out: QuantizedRows, scaling: Scaling) -> Launch:
    """Return the launch that quantises rows.

    Args:
        x_MK: (M, K) bfloat16, float16 or float32, contiguous.
        out: values (M, K) and their scales, to fill.
        scaling: which neighbours share a scale.
    """
    return _rows_launch(x_MK, Quantized(out.values, out.scales), scaling)


def _rows_launch(x_MK: torch.Tensor, out: Quantized, scaling: Scaling) -> Launch:
    depth = x_MK.shape[-1]
    width = next_power_of_2(block_width(scaling, depth))
    blocks = max(1, min(_ROW, next_power_of_2(depth)) // width)
    rows, num_rows = max(1, _TILE // (blocks * width)), x_MK.numel() // depth
    return Launch(
        _quantize_rows_kernel,
        cdiv(num_rows, rows) * cdiv(depth, blocks * width),
        {
            "x_ptr": x_MK,
            "values_ptr": out.values,
            "scales_ptr": as_pointer(out.scales),
            "num_rows": num_rows,
            "K": depth,
            "WIDTH": width,
            "BLOCKS": blocks,
            "ROWS": rows,
            "MX": scaling == "mxfp8",
        },
    )


def new_quantized_rows(shape: Sequence[int], like: torch.Tensor, scaling: Scaling) -> QuantizedRows:
    """Return unwritten values (M, K) and scales, for rows of the dtype and device of `like`."""
    rows, depth = shape
    sizes = rows, cdiv(depth, block_width(scaling, depth))
    scales = like.new_empty(sizes, dtype=scale_dtype(scaling))
    return QuantizedRows(like.new_empty((rows, depth), dtype=E4M3), scales, like.dtype)


def new_quantized(w_EMK: torch.Tensor, scaling: Scaling) -> Quantized:
    """Return unwritten values and scales for a weight of this shape."""
    experts, rows, depth = w_EMK.shape
    tall, wide = block_height(scaling), block_width(scaling, depth)
    sizes = (experts, cdiv(rows, tall), cdiv(depth, wide))
    values = w_EMK.new_empty((experts, rows, depth), dtype=E4M3)
    return Quantized(values, w_EMK.new_empty(sizes, dtype=scale_dtype(scaling)))


def new_quantized_weight(
    w_EMK: torch.Tensor, scaling: Scaling, *, forward: bool, backward: bool
) -> QuantizedWeight:
    """Return unwritten values and scales in the layouts that are wanted."""
    return QuantizedWeight(
        new_quantized(w_EMK, scaling) if forward else None,
        new_quantized(w_EMK.mT, scaling) if backward else None,
    )


def quantize_weight_launches(
    w_EMK: torch.Tensor, out: QuantizedWeight, scaling: Scaling
) -> list[Launch]:
    """Return the launches that quantise a weight: one, or rowwise one per layout.

    Args:
        w_EMK: (E, M, K) bfloat16, float16 or float32, contiguous.
        out: what to fill.
        scaling: which values share a scale.
    """
    if scaling == "blockwise":
        return [_squares_launch(w_EMK, out)]
    if scaling == "mxfp8":
        return [mx_weight_launch(w_EMK, out)]
    forward = [] if out.forward is None else [_rows_launch(w_EMK, out.forward, scaling)]
    return forward if out.backward is None else [*forward, _columns_launch(w_EMK, out.backward)]


def _squares_launch(w_EMK: torch.Tensor, out: QuantizedWeight) -> Launch:
    experts, rows, depth = w_EMK.shape
    # A pointer that is not written through is any.
    forward, backward = out.forward or (w_EMK, w_EMK), out.backward or (w_EMK, w_EMK)
    return Launch(
        _quantize_squares_kernel,
        experts * cdiv(rows, BLOCK) * cdiv(depth, BLOCK),
        {
            "w_ptr": w_EMK,
            "values_ptr": forward[0],
            "scales_ptr": forward[1],
            "transposed_ptr": backward[0],
            "transposed_scales_ptr": backward[1],
            "M": rows,
            "K": depth,
            "FORWARD": out.forward is not None,
            "BACKWARD": out.backward is not None,
            "BLOCK": BLOCK,
        },
        num_warps=8,
    )


def _columns_launch(w_EMK: torch.Tensor, out: Quantized) -> Launch:
    experts, rows, depth = w_EMK.shape
    side = 64
    return Launch(
        _quantize_columns_kernel,
        experts * cdiv(depth, side),
        {
            "w_ptr": w_EMK,
            "transposed_ptr": out.values,
            "scales_ptr": out.scales,
            "M": rows,
            "K": depth,
            "BLOCK_M": side,
            "BLOCK_K": side,
        },
    )

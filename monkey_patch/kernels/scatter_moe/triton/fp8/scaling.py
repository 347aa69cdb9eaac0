"""What the FP8 kernels share: scales and values of a tile, and the scales inside a product.

Blocks of 128 are promoted: the tensor cores multiply 128 deep, then float32 units add the result
times both scales to the accumulator. On Hopper, whose FP8 products keep about 14 bits of a sum
(DeepSeek-V3, arXiv 2412.19437, 3.3.2), this bounds that error too; rowwise leaves it as it is.

The scales of mxfp8 go into the tensor cores beside the values (`tl.dot_scaled`). Triton 3.7.1 emits
Blackwell's instruction for this on sm_100 only for tiles of 128 rows: with 64 it multiplies in
bfloat16 (compiled ahead of time, tests/monkey_patch/kernels/test_aot_fp8.py). Scales are loaded as
they lie, since gathered rows fit no layout that the hardware could copy by itself.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from monkey_patch.kernels.launch import cdiv
from monkey_patch.kernels.scatter_moe.quantize import (
    BLOCK,
    E8M0,
    MX_BLOCK,
    Scaling,
    block_height,
    block_width,
)
from monkey_patch.kernels.scatter_moe.triton.tiles import Tiles

_LEAST_DEPTH = 32  # of an FP8 product on tensor cores


@triton.jit
def largest_bits(x, axis: tl.constexpr):
    """Return the bits of the largest magnitude: as an integer a NaN is larger than any number."""
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis)


@triton.jit
def scale_of(bits):
    """Return the scale of blocks whose largest magnitude has these bits."""
    smallest = 2.0**-126
    largest = bits.to(tl.float32, bitcast=True)
    # Triton's plain division is approximate, the definition is not.
    scale = tl.div_rn(largest, tl.full(largest.shape, 448.0, tl.float32))
    scale = tl.where(scale < smallest, smallest, scale)  # a NaN stays
    return tl.where(largest == 0.0, 1.0, scale)


@triton.jit
def to_e4m3(x, scale):
    """Return x / scale in e4m3, for a scale that broadcasts to x."""
    return tl.div_rn(x, tl.broadcast_to(scale, x.shape)).to(tl.float8e4nv)


@triton.jit
def exponent_of(bits):
    """Return the e8m0 scale, as int32, of blocks whose largest magnitude has these bits."""
    # 448 is 1.75 * 2^8: with a larger mantissa the next power of two.
    exponent = (bits >> 23) - 8 + tl.where((bits & 0x7FFFFF) > 0x600000, 1, 0)
    exponent = tl.where(bits == 0, 127, tl.maximum(exponent, 1))
    return tl.where(bits >= 0x7F800000, 255, exponent)


@triton.jit
def power_of_two(exponent):
    """Return 2^(exponent - 127) in float32 for an int32 in [1, 254], else NaN."""
    bits = tl.where(exponent < 255, exponent << 23, 0x7FC00000)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def quantize_tile(x, MX: tl.constexpr):
    """Return the values and the scales of a float32 tile whose rows are one block each."""
    bits = largest_bits(x, 1)
    if MX:
        scale = exponent_of(bits)
        # The inverse of a power of two is exact.
        inverse = power_of_two(tl.where(scale < 255, 254 - scale, 255))
        values = (x * inverse[:, None]).to(tl.float8e4nv)
        scale = scale.to(tl.uint8)
    else:
        scale = scale_of(bits)
        values = to_e4m3(x, scale[:, None])
    return values, scale


@triton.jit
def weight_scales(
    scales_ptr, expert, column, COLUMNS: tl.constexpr, TALL: tl.constexpr, SCALES: tl.constexpr
):
    """Return pointers to the first scale of columns of x @ W.T, W being (E, COLUMNS, depth).

    Columns that do not exist get the scale of the last; what they multiply is not stored.
    """
    BLOCKS: tl.constexpr = (COLUMNS + TALL - 1) // TALL
    return scales_ptr + (expert * BLOCKS + tl.minimum(column, COLUMNS - 1) // TALL) * SCALES


@triton.jit
def add_product(
    total,
    rows,
    weight,
    rows_scales,
    weights_scales,
    k,
    SCALES: tl.constexpr,
    SCALING: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Return total + rows @ weight, at depth k; rowwise `finish_product` applies the scales.

    Args:
        total: (M, N) float32.
        rows: (M, BLOCK_K) e4m3.
        weight: (BLOCK_K, N) e4m3.
        rows_scales: (M, 1) pointers to the first scale of a row.
        weights_scales: (1, N) pointers to the first scale of a column, or one for all.
        k: where the step begins; a step lies in one block, or consists of whole ones in mxfp8.
        SCALES: of a row or column.
        SCALING: as `scaling_arguments` names it.
        BLOCK_K: depth of the step.
    """
    if SCALING == "blockwise":
        scale = tl.load(rows_scales + k // 128) * tl.load(weights_scales + k // 128)
        total += tl.dot(rows, weight) * scale
    elif SCALING == "rowwise":
        total = tl.dot(rows, weight, total)
    else:
        blocks = k // 32 + tl.arange(0, BLOCK_K // 32)[None, :]
        rows_ptrs = rows_scales + blocks
        weights_ptrs = weights_scales.trans() + blocks
        if SCALES % (BLOCK_K // 32) == 0:
            rows_scale = tl.load(rows_ptrs)
            weights_scale = tl.load(weights_ptrs)
        else:
            rows_scale = tl.load(rows_ptrs, mask=blocks < SCALES, other=127)
            weights_scale = tl.load(weights_ptrs, mask=blocks < SCALES, other=127)
        if SCALING == "mxfp8":
            total = tl.dot_scaled(rows, rows_scale, "e4m3", weight, weights_scale, "e4m3", total)
        else:
            wide = _scaled(rows, rows_scale)
            weight = _scaled(weight.trans(), weights_scale).trans()
            total = tl.dot(wide, weight, total, input_precision="ieee")
    return total


@triton.jit
def _scaled(values, scales):
    """Return values * scales in float32, for rows in blocks of 32."""
    x = values.to(tl.float32).reshape(values.shape[0], values.shape[1] // 32, 32)
    x *= power_of_two(scales.to(tl.int32))[:, :, None]
    return x.reshape(values.shape)


@triton.jit
def finish_product(total, rows_scales, weights_scales, SCALING: tl.constexpr):
    """Return the sum of all `add_product`."""
    if SCALING == "rowwise":
        total *= tl.load(rows_scales) * tl.load(weights_scales)
    return total


def fit(tiles: Tiles, columns: int, depth: int) -> Tiles:
    """Shrink a cut to a product of quantised operands.

    Raises:
        ValueError: a step of the cut is deeper than a block, or the cut asks for a persistent grid,
            which takes registers that these kernels do not have.
    """
    if tiles.block_k > BLOCK:
        raise ValueError(f"block_k is {tiles.block_k}, but a scale holds for {BLOCK} values only")
    if tiles.persistent:
        raise ValueError("persistent is true, but a program of an FP8 stage computes one tile")
    return tiles.fit(columns, max(depth, _LEAST_DEPTH))


def scaling_arguments(
    tiles: Tiles, values: torch.Tensor, columns: int = 0, *, scaling: Scaling, tma: bool
) -> dict[str, Any]:
    """Return what every product of quantised operands is told about its cut and its scales.

    Args:
        tiles: the cut, made to fit.
        values: an operand, contracted over its last dimension.
        columns: where the second part of the weight begins, if it has parts.
        scaling: of the operands. Triton's interpreter has no `tl.dot_scaled`: for tensors on a CPU
            the kernels are told "mxfp8 emulated" and multiply by the scales themselves.
        tma: read contiguous operands through tensor descriptors.
    """
    width, depth = tiles.block_n, values.shape[-1]
    is_emulated = scaling == "mxfp8" and values.device.type == "cpu"
    return {
        "SCALING": "mxfp8 emulated" if is_emulated else scaling,
        # A scale of the weight holds for TALL of its rows; there are SCALES along the depth.
        "TALL": block_height(scaling),
        "SCALES": cdiv(depth, block_width(scaling, depth)),
        # All columns of a tile lie in one block: one scale to load and to multiply by.
        "ONE_SCALE": scaling == "blockwise" and width <= BLOCK and columns % width == 0,
        "TMA": tma,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": width,
        "BLOCK_K": tiles.block_k,
    }


def as_pointer(scales: torch.Tensor) -> torch.Tensor:
    """Return scales as a kernel takes them: Triton knows e8m0 as bytes."""
    return scales.view(torch.uint8) if scales.dtype == E8M0 else scales


def epilogue_columns(tiles: Tiles, scaling: Scaling) -> int:
    """Return how many columns an epilogue finishes at a time: in mxfp8 no less than a block."""
    return max(tiles.epilogue_n, MX_BLOCK) if scaling == "mxfp8" else tiles.epilogue_n


def is_whole_blocks(tiles: Tiles, width: int, scaling: Scaling) -> bool:
    """Tell whether a tile of `width` columns in all, made to fit, holds whole blocks of a row."""
    if scaling == "mxfp8":
        return tiles.block_n % MX_BLOCK == 0
    is_one = tiles.block_n == BLOCK or (tiles.block_n < BLOCK and tiles.block_n >= width)
    return scaling == "blockwise" and is_one

"""What the FP8 kernels share: scales and values of a tile, and the scales inside a product.

Blocks of 128 are promoted: the tensor cores multiply 128 deep, then float32 units add the result
times both scales to the accumulator. On Hopper, whose FP8 products keep about 14 bits of a sum
(DeepSeek-V3, arXiv 2412.19437, 3.3.2), this bounds that error too; rowwise leaves it as it is.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from monkey_patch.kernels.launch import cdiv
from monkey_patch.kernels.scatter_moe.quantize import BLOCK
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
def quantize_tile(x):
    """Return the values and the scales of a float32 tile whose rows are one block each."""
    scale = scale_of(largest_bits(x, 1))
    return to_e4m3(x, scale[:, None]), scale


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
def add_product(total, rows, weight, rows_scales, weights_scales, k, BLOCKWISE: tl.constexpr):
    """Return total + rows @ weight, at depth k; scaled if BLOCKWISE, else `finish_product` does."""
    if BLOCKWISE:
        scale = tl.load(rows_scales + k // 128) * tl.load(weights_scales + k // 128)
        total += tl.dot(rows, weight) * scale
    else:
        total = tl.dot(rows, weight, total)
    return total


@triton.jit
def finish_product(total, rows_scales, weights_scales, BLOCKWISE: tl.constexpr):
    """Return the sum of all `add_product`."""
    if not BLOCKWISE:
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
    tiles: Tiles, depth: int, columns: int = 0, *, blockwise: bool, tma: bool
) -> dict[str, Any]:
    """Return what every product of quantised operands is told about its cut and its scales.

    Args:
        tiles: the cut, made to fit.
        depth: what the product contracts over.
        columns: where the second part of the weight begins, if it has parts.
        blockwise: one scale per block, else per row.
        tma: read contiguous operands through tensor descriptors.
    """
    width = tiles.block_n
    return {
        "BLOCKWISE": blockwise,
        # A scale of the weight holds for TALL of its rows; there are SCALES along the depth.
        "TALL": BLOCK if blockwise else 1,
        "SCALES": cdiv(depth, BLOCK) if blockwise else 1,
        # All columns of a tile lie in one block: one scale to load and to multiply by.
        "ONE_SCALE": blockwise and width <= BLOCK and columns % width == 0,
        "TMA": tma,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": width,
        "BLOCK_K": tiles.block_k,
    }


def is_one_block(tiles: Tiles, width: int) -> bool:
    """Tell whether a tile of `width` columns in all, made to fit, is a block of every row."""
    return tiles.block_n == BLOCK or (tiles.block_n < BLOCK and tiles.block_n >= width)

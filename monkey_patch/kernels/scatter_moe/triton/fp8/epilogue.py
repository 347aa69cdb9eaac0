"""Finish a tile a few columns at a time, and quantise these (mxfp8) or the tile as a whole.

With all columns at once the epilogues spill registers. A scale needs a whole block, which is kept
rounded to 16 bit if it is the tile: no more registers than the accumulators that it comes from.
"""

from __future__ import annotations

import triton
import triton.language as tl

from monkey_patch.kernels.scatter_moe.triton.fp8.scaling import (
    largest_bits,
    quantize_tile,
    scale_of,
    to_e4m3,
)
from monkey_patch.kernels.scatter_moe.triton.swiglu import halves


@triton.jit
def store_block(
    x,
    rows,
    is_row,
    first_column,
    values_ptr,
    scales_ptr,
    COLUMNS: tl.constexpr,
    EPILOGUE_N: tl.constexpr,
):
    """Quantise a tile that is one block of every row of (N, COLUMNS); zeros past its columns."""
    rows = rows.to(tl.int64)
    scale = scale_of(_largest_bits(x, EPILOGUE_N))
    SCALES: tl.constexpr = (COLUMNS + 127) // 128
    tl.store(scales_ptr + rows * SCALES + first_column // 128, scale, mask=is_row)
    _store_values(x, scale, rows, is_row, first_column, values_ptr, COLUMNS, EPILOGUE_N)


@triton.jit
def store_blocks(x, rows, is_row, first_column, values_ptr, scales_ptr, COLUMNS: tl.constexpr):
    """Quantise some columns of (N, COLUMNS) in blocks of 32; zeros past the last of all."""
    SCALES: tl.constexpr = (COLUMNS + 31) // 32
    BLOCKS: tl.constexpr = x.shape[1] // 32
    rows = rows.to(tl.int64)[:, None]
    values, scales = quantize_tile(x.to(tl.float32).reshape(x.shape[0] * BLOCKS, 32), True)
    columns = first_column + tl.arange(0, x.shape[1])[None, :]
    mask = is_row[:, None] & (columns < COLUMNS)
    tl.store(values_ptr + rows * COLUMNS + columns, values.reshape(x.shape), mask=mask)
    blocks = first_column // 32 + tl.arange(0, BLOCKS)[None, :]
    mask = is_row[:, None] & (blocks < SCALES)
    tl.store(scales_ptr + rows * SCALES + blocks, scales.reshape(x.shape[0], BLOCKS), mask=mask)


@triton.jit
def _largest_bits(x, EPILOGUE_N: tl.constexpr):
    if x.shape[1] > EPILOGUE_N:
        left, right = halves(x)
        bits = tl.maximum(_largest_bits(left, EPILOGUE_N), _largest_bits(right, EPILOGUE_N))
    else:
        bits = largest_bits(x.to(tl.float32), 1)
    return bits


@triton.jit
def _store_values(
    x,
    scale,
    rows,
    is_row,
    first_column,
    values_ptr,
    COLUMNS: tl.constexpr,
    EPILOGUE_N: tl.constexpr,
):
    if x.shape[1] > EPILOGUE_N:
        left, right = halves(x)
        second = first_column + left.shape[1]
        _store_values(left, scale, rows, is_row, first_column, values_ptr, COLUMNS, EPILOGUE_N)
        _store_values(right, scale, rows, is_row, second, values_ptr, COLUMNS, EPILOGUE_N)
    else:
        columns = first_column + tl.arange(0, x.shape[1])[None, :]
        mask = is_row[:, None] & (columns < COLUMNS)
        values = to_e4m3(x.to(tl.float32), scale[:, None])
        tl.store(values_ptr + rows[:, None] * COLUMNS + columns, values, mask=mask)

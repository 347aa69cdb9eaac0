"""What the kernels of the weight gradient share: loading a step's rows, writing a tile.

Of the two sides of the product one lies sorted by expert, the other is gathered by token.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_pair(
    left,
    right,
    slot_of_row_ptr,
    row,
    is_row,
    m,
    n,
    M: tl.constexpr,
    N: tl.constexpr,
    TOP_K: tl.constexpr,
    GATHER_LEFT: tl.constexpr,
    TMA: tl.constexpr,
    MASK_GATHERED: tl.constexpr,
    MASK_SORTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Load BLOCK_K rows of both sides from `row` on.

    A side that is masked gets zeros where `is_row` says no; one that is not has to have the rows,
    or be read by TMA, which gives zeros outside of a matrix.
    """
    rows = row + tl.arange(0, BLOCK_K)
    if MASK_GATHERED:
        slot = tl.load(slot_of_row_ptr + rows, mask=is_row, other=0)
    else:
        slot = tl.load(slot_of_row_ptr + rows)
    token = (slot // TOP_K).to(tl.int64)
    if GATHER_LEFT:
        a = _load_rows(left, token, is_row, m, M, MASK_GATHERED, BLOCK_M)
        b = _load_sorted(right, row, rows, is_row, n, N, TMA, MASK_SORTED, BLOCK_N)
    else:
        a = _load_sorted(left, row, rows, is_row, m, M, TMA, MASK_SORTED, BLOCK_M)
        b = _load_rows(right, token, is_row, n, N, MASK_GATHERED, BLOCK_N)
    return a, b


@triton.jit
def _load_sorted(
    matrix,
    row,
    rows,
    is_row,
    column,
    WIDTH: tl.constexpr,
    TMA: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if TMA:
        tile = matrix.load([row, column])
        if MASKED:
            tile = tl.where(is_row[:, None], tile, 0.0)
    else:
        tile = _load_rows(matrix, rows.to(tl.int64), is_row, column, WIDTH, MASKED, BLOCK)
    return tile


@triton.jit
def _load_rows(
    matrix_ptr, rows, is_row, column, WIDTH: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr
):
    columns = column + tl.arange(0, BLOCK)
    places = matrix_ptr + rows[:, None] * WIDTH + columns[None, :]
    if MASKED:
        tile = tl.load(places, mask=is_row[:, None] & (columns < WIDTH)[None, :], other=0.0)
    elif WIDTH % BLOCK == 0:
        tile = tl.load(places)
    else:
        tile = tl.load(places, mask=(columns < WIDTH)[None, :], other=0.0)
    return tile


@triton.jit
def store_tile(
    acc, out_ptr, expert, m, n, M: tl.constexpr, N: tl.constexpr, ACCUMULATE: tl.constexpr
):
    """Write a tile of (E, M, N) from row m and column n on, or add it."""
    ms, ns = tl.arange(0, acc.shape[0])[:, None], tl.arange(0, acc.shape[1])[None, :]
    # The 64-bit part is one number: a tensor of it spills where float32 is stored on sm_100.
    out_ptrs = out_ptr + ((expert.to(tl.int64) * M + m) * N + n) + (ms * N + ns)
    is_inside = (m + ms < M) & (n + ns < N)
    if ACCUMULATE:
        acc += tl.load(out_ptrs, mask=is_inside, other=0.0).to(tl.float32)
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=is_inside)

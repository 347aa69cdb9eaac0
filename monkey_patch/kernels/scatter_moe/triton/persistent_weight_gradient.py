"""The weight gradient as one loop over all steps of all tiles that a program owns.

At few rows per expert a tile is three or four steps: with a loop of its own each tile waits for its
first rows, and nothing is loaded while its result is stored. Here the pipeline runs on into the
next tile. Every tile is still summed by one program in one order, whatever the grid.
"""

from __future__ import annotations

import triton
import triton.language as tl

from monkey_patch.kernels.scatter_moe.triton.swiglu import halves
from monkey_patch.kernels.scatter_moe.triton.weight_gradient_tile import load_pair, store_tile


@triton.jit
def persistent_weight_gradient_kernel(
    left,
    right,
    out_ptr,
    slot_of_row_ptr,
    offsets_ptr,
    M: tl.constexpr,
    N: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    GATHER_LEFT: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EPILOGUE_N: tl.constexpr,
):
    """out[e] = left[rows of e].T @ right[rows of e]; one side is gathered by token.

    Programs take tiles in turn, those of an expert side by side, so that what several read is in
    L2. The steps of an expert end with its last row and begin, if need be, before its first. There
    the gathered side is zeros, and the other holds rows of an expert before, which exist; rows past
    the last expert are undefined. NaN in such a row reaches a neighbour in the same tensor.
    """
    N_TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    TILES: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M * N_TILES
    work = tl.program_id(0) - tl.num_programs(0)
    num_steps = _steps_of_program(offsets_ptr, TILES, NUM_EXPERTS, EXPERTS, BLOCK_K)
    row, first_row, end_row, expert, m, n = 0, 0, 0, 0, 0, 0
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(num_steps):
        row += BLOCK_K
        if row >= end_row:
            work += tl.num_programs(0)
            expert = work // TILES
            m = (work // N_TILES % (TILES // N_TILES)) * BLOCK_M
            n = (work % N_TILES) * BLOCK_N
            first_row = tl.load(offsets_ptr + expert)
            end_row = tl.load(offsets_ptr + expert + 1)
            row = end_row - _steps(first_row, end_row, BLOCK_K) * BLOCK_K
        is_row = row + tl.arange(0, BLOCK_K) >= first_row
        a, b = load_pair(
            left, right, slot_of_row_ptr, row, is_row, m, n,
            M, N, TOP_K, GATHER_LEFT, TMA, True, not TMA, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        acc = tl.dot(a.T, b, acc, input_precision=PRECISION)
        if row + BLOCK_K >= end_row:
            _store_columns(acc, out_ptr, expert, m, n, M, N, ACCUMULATE, EPILOGUE_N)
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)


@triton.jit
def _steps(first_row, end_row, BLOCK_K: tl.constexpr):
    """An idle expert takes a step without rows, since its zeros have to be written."""
    return tl.maximum((end_row - first_row + BLOCK_K - 1) // BLOCK_K, 1)


@triton.jit
def _steps_of_program(
    offsets_ptr,
    TILES: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sum the steps of the tiles that are this program's, of TILES per expert."""
    expert = tl.arange(0, EXPERTS)
    is_expert = expert < NUM_EXPERTS
    first_row = tl.load(offsets_ptr + expert, mask=is_expert, other=0)
    end_row = tl.load(offsets_ptr + expert + 1, mask=is_expert, other=0)
    tiles = _tiles_before(expert * TILES + TILES) - _tiles_before(expert * TILES)
    return tl.sum(tl.where(is_expert, tiles * _steps(first_row, end_row, BLOCK_K), 0), axis=0)


@triton.jit
def _tiles_before(tile):
    """Count this program's tiles before `tile`."""
    programs = tl.num_programs(0)
    return tl.maximum(tile - tl.program_id(0) + programs - 1, 0) // programs


@triton.jit
def _store_columns(
    acc,
    out_ptr,
    expert,
    m,
    n,
    M: tl.constexpr,
    N: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    EPILOGUE_N: tl.constexpr,
):
    """Store EPILOGUE_N columns at a time: the loads of the next tile hold most shared memory."""
    if acc.shape[1] > EPILOGUE_N:
        left, right = halves(acc)
        _store_columns(left, out_ptr, expert, m, n, M, N, ACCUMULATE, EPILOGUE_N)
        half = left.shape[1]
        _store_columns(right, out_ptr, expert, m, n + half, M, N, ACCUMULATE, EPILOGUE_N)
    else:
        store_tile(acc, out_ptr, expert, m, n, M, N, ACCUMULATE)

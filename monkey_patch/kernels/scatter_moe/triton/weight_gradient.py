"""The gradient of an expert weight: one product over the expert's rows per output tile.

One program owns a tile of one expert and walks over the expert's rows, so every element, zeros of
idle experts included, is written once by one writer: no atomics, no clearing beforehand.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from monkey_patch.kernels.launch import Launch, cdiv
from monkey_patch.kernels.scatter_moe.triton.rows import cut_arguments, grid_of
from monkey_patch.kernels.scatter_moe.triton.tiles import Tiles, takes_tma


@triton.jit(do_not_specialize=["num_tiles"])
def _weight_gradient_kernel(
    left,
    right,
    out_ptr,
    slot_of_row_ptr,
    offsets_ptr,
    num_tiles,
    M: tl.constexpr,
    N: tl.constexpr,
    TOP_K: tl.constexpr,
    GATHER_LEFT: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[e] = left[rows of e].T @ right[rows of e]; one side is gathered by token."""
    M_TILES: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    N_TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    for work in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        expert = work // (M_TILES * N_TILES)
        m = (work // N_TILES % M_TILES) * BLOCK_M
        n = (work % N_TILES) * BLOCK_N
        first_row = tl.load(offsets_ptr + expert)
        end_row = tl.load(offsets_ptr + expert + 1)
        full_end = first_row + (end_row - first_row) // BLOCK_K * BLOCK_K
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for row in range(first_row, full_end, BLOCK_K):
            a, b = _load_pair(
                left, right, slot_of_row_ptr, row, end_row, m, n,
                M, N, TOP_K, GATHER_LEFT, TMA, False, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            acc = tl.dot(a.T, b, acc, input_precision=PRECISION)
        if full_end < end_row:
            a, b = _load_pair(
                left, right, slot_of_row_ptr, full_end, end_row, m, n,
                M, N, TOP_K, GATHER_LEFT, TMA, True, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            acc = tl.dot(a.T, b, acc, input_precision=PRECISION)
        ms, ns = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
        # The 64-bit part is one number: a tensor of it spills where float32 is stored on sm_100.
        out_ptrs = out_ptr + ((expert.to(tl.int64) * M + m) * N + n) + (ms * N + ns)
        is_inside = (m + ms < M) & (n + ns < N)
        if ACCUMULATE:
            acc += tl.load(out_ptrs, mask=is_inside, other=0.0).to(tl.float32)
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=is_inside)


@triton.jit
def _load_pair(
    left,
    right,
    slot_of_row_ptr,
    row,
    end_row,
    m,
    n,
    M: tl.constexpr,
    N: tl.constexpr,
    TOP_K: tl.constexpr,
    GATHER_LEFT: tl.constexpr,
    TMA: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Load BLOCK_K rows of both sides; MASKED clears those past the expert's end on both.

    Clearing one side would do for finite numbers, but rows past the last expert are undefined.
    """
    rows = row + tl.arange(0, BLOCK_K)
    is_row = rows < end_row
    if MASKED:
        slot = tl.load(slot_of_row_ptr + rows, mask=is_row, other=0)
    else:
        slot = tl.load(slot_of_row_ptr + rows)
    token = (slot // TOP_K).to(tl.int64)
    if GATHER_LEFT:
        a = _load_rows(left, token, is_row, m, M, MASKED, BLOCK_M)
        b = _load_sorted(right, row, rows, is_row, n, N, TMA, MASKED, BLOCK_N)
    else:
        a = _load_sorted(left, row, rows, is_row, m, M, TMA, MASKED, BLOCK_M)
        b = _load_rows(right, token, is_row, n, N, MASKED, BLOCK_N)
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


def weight_gradient_launch(
    left: torch.Tensor,
    right: torch.Tensor,
    out_EMN: torch.Tensor,
    slot_of_row: torch.Tensor,
    offsets: torch.Tensor,
    top_k: int,
    tiles: Tiles,
    *,
    gather_left: bool,
    accumulate: bool,
) -> Launch:
    """Return the launch that fills `out_EMN`.

    Args:
        left: (T, M) if `gather_left`, else (T * K, M) sorted by expert; contiguous.
        right: (T * K, N) sorted by expert if `gather_left`, else (T, N); contiguous.
        out_EMN: (E, M, N), float32 or the dtype of the operands.
        slot_of_row: of the `Routing`.
        offsets: of the `Routing`.
        top_k: K.
        tiles: the cut; block_k counts rows of the expert.
        gather_left: which side is indexed by token.
        accumulate: add to `out_EMN` instead of overwriting it.
    """
    num_experts, m, n = out_EMN.shape
    tiles = tiles.fit(columns=n, depth=tiles.block_k, rows=m)
    left_in, right_in = left, right
    tma = tiles.tma and takes_tma(right if gather_left else left)
    if tma and gather_left:
        right_in = TensorDescriptor.from_tensor(right, [tiles.block_k, tiles.block_n])
    elif tma:
        left_in = TensorDescriptor.from_tensor(left, [tiles.block_k, tiles.block_m])
    num_tiles = num_experts * cdiv(m, tiles.block_m) * cdiv(n, tiles.block_n)
    return Launch(
        _weight_gradient_kernel,
        grid_of(tiles, num_tiles, left),
        {
            "left": left_in,
            "right": right_in,
            "out_ptr": out_EMN,
            "slot_of_row_ptr": slot_of_row,
            "offsets_ptr": offsets,
            "num_tiles": num_tiles,
            "M": m,
            "N": n,
            "TOP_K": top_k,
            "GATHER_LEFT": gather_left,
            "ACCUMULATE": accumulate,
            **cut_arguments(tiles, left.dtype, tma=tma),
        },
        tiles.num_warps,
        tiles.num_stages,
    )

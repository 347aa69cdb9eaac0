"""The gradient of an expert weight: one product over the expert's rows per output tile.

One program owns a tile of one expert and walks over the expert's rows, so every element, zeros of
idle experts included, is written once by one writer: no atomics, no clearing beforehand.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from monkey_patch.kernels.launch import Launch, cdiv, next_power_of_2
from monkey_patch.kernels.scatter_moe.triton.persistent_weight_gradient import (
    persistent_weight_gradient_kernel,
)
from monkey_patch.kernels.scatter_moe.triton.rows import cut_arguments, grid_of
from monkey_patch.kernels.scatter_moe.triton.tiles import Tiles, takes_tma
from monkey_patch.kernels.scatter_moe.triton.weight_gradient_tile import load_pair, store_tile


@triton.jit
def _weight_gradient_kernel(
    left,
    right,
    out_ptr,
    slot_of_row_ptr,
    offsets_ptr,
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
    """out[e] = left[rows of e].T @ right[rows of e]; one side is gathered by token.

    The rows of the last step are cleared past the expert's end on both sides: one would do for
    finite numbers, but rows past the last expert are undefined.
    """
    M_TILES: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    N_TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    work = tl.program_id(0)
    expert = work // (M_TILES * N_TILES)
    m = (work // N_TILES % M_TILES) * BLOCK_M
    n = (work % N_TILES) * BLOCK_N
    first_row = tl.load(offsets_ptr + expert)
    end_row = tl.load(offsets_ptr + expert + 1)
    full_end = first_row + (end_row - first_row) // BLOCK_K * BLOCK_K
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for row in range(first_row, full_end, BLOCK_K):
        is_row = row + tl.arange(0, BLOCK_K) < end_row
        a, b = load_pair(
            left, right, slot_of_row_ptr, row, is_row, m, n,
            M, N, TOP_K, GATHER_LEFT, TMA, False, False, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        acc = tl.dot(a.T, b, acc, input_precision=PRECISION)
    if full_end < end_row:
        is_row = full_end + tl.arange(0, BLOCK_K) < end_row
        a, b = load_pair(
            left, right, slot_of_row_ptr, full_end, is_row, m, n,
            M, N, TOP_K, GATHER_LEFT, TMA, True, True, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        acc = tl.dot(a.T, b, acc, input_precision=PRECISION)
    store_tile(acc, out_ptr, expert, m, n, M, N, ACCUMULATE)


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
        tiles: the cut; block_k counts rows of the expert. If persistent, epilogue_n counts the
            columns that are stored at a time.
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
    kernel, own = _weight_gradient_kernel, {}
    if tiles.persistent:
        experts = {"NUM_EXPERTS": num_experts, "EXPERTS": next_power_of_2(num_experts)}
        kernel, own = persistent_weight_gradient_kernel, {**experts, "EPILOGUE_N": tiles.epilogue_n}
    return Launch(
        kernel,
        grid_of(tiles, num_tiles, left),
        {
            "left": left_in,
            "right": right_in,
            "out_ptr": out_EMN,
            "slot_of_row_ptr": slot_of_row,
            "offsets_ptr": offsets,
            "M": m,
            "N": n,
            "TOP_K": top_k,
            "GATHER_LEFT": gather_left,
            "ACCUMULATE": accumulate,
            **cut_arguments(tiles, left.dtype, tma=tma),
            **own,
        },
        tiles.num_warps,
        tiles.num_stages,
    )

"""From the gradient of the output to the gradient of the hidden rows, through down and SwiGLU.

With g = d_out[token] @ down[e] the gradient of the routing weight is <g, act>, so the output of the
down projection is never needed (SonicMoE, arXiv 2512.14080). The epilogue takes a few columns of
the tile at a time: with all of them at once it spills registers on sm_90 and sm_100. It moves 1.4
times the bytes of the operands, which is why a persistent grid hides it behind the next product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from monkey_patch.kernels.launch import Launch, cdiv
from monkey_patch.kernels.scatter_moe.triton.rows import (
    cut_arguments,
    gathered_rows,
    grid_of,
    load_gathered,
    row_tile,
    tile_count,
    walk_arguments,
)
from monkey_patch.kernels.scatter_moe.triton.swiglu import halves, swiglu_gradient
from monkey_patch.kernels.scatter_moe.triton.tiles import Tiles, takes_tma


@triton.jit(do_not_specialize=["num_row_tiles", "num_slots"])
def _activation_gradient_kernel(
    d_out_ptr,
    weight,
    hidden_ptr,
    routing_weights_ptr,
    d_hidden_ptr,
    scaled_act_ptr,
    partial_ptr,
    slot_of_row_ptr,
    tiles_ptr,
    num_row_tiles,
    num_slots,
    D: tl.constexpr,
    F: tl.constexpr,
    TOP_K: tl.constexpr,
    STORE_ACT: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EPILOGUE_N: tl.constexpr,
    PERSISTENT: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
):
    COLUMN_TILES: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    num_tiles = tile_count(tiles_ptr, num_row_tiles) * COLUMN_TILES
    done = tl.program_id(0) - tl.num_programs(0)
    for work in tl.range(
        tl.program_id(0), num_tiles, tl.num_programs(0),
        flatten=PERSISTENT, warp_specialize=WARP_SPECIALIZE,
    ):  # fmt: skip
        expert, first_row, end_row = row_tile(tiles_ptr, num_row_tiles, work // COLUMN_TILES)
        column = (work % COLUMN_TILES) * BLOCK_N
        _, is_row, _, token = gathered_rows(slot_of_row_ptr, first_row, end_row, TOP_K, BLOCK_M)
        columns = column + tl.arange(0, BLOCK_N)
        is_column = (columns < F)[None, :]
        ks = tl.arange(0, BLOCK_K)
        d_out_ptrs = d_out_ptr + token[:, None] * D + ks[None, :]
        if not TMA:
            w_ptrs = weight + (expert.to(tl.int64) * D + ks[:, None]) * F + columns[None, :]
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, D, BLOCK_K):
            d_out = load_gathered(d_out_ptrs, k, is_row[:, None], D, BLOCK_K)
            if TMA:
                w = weight.load([expert, k, column]).reshape(BLOCK_K, BLOCK_N)
            else:
                is_weight = is_column & (ks + k < D)[:, None]
                w = tl.load(w_ptrs + k * F, mask=is_weight, other=0.0)
            acc = tl.dot(d_out, w, acc, input_precision=PRECISION)

        # From the map again: rows kept while the tile is multiplied would spill registers.
        done += tl.num_programs(0)
        _finish_tile(
            acc, done, hidden_ptr, routing_weights_ptr, d_hidden_ptr, scaled_act_ptr, partial_ptr,
            slot_of_row_ptr, tiles_ptr, num_row_tiles, num_slots,
            COLUMN_TILES, F, TOP_K, STORE_ACT, EPILOGUE_N,
        )  # fmt: skip


@triton.jit
def _finish_tile(
    acc,
    work,
    hidden_ptr,
    routing_weights_ptr,
    d_hidden_ptr,
    scaled_act_ptr,
    partial_ptr,
    slot_of_row_ptr,
    tiles_ptr,
    num_row_tiles,
    num_slots,
    COLUMN_TILES: tl.constexpr,
    F: tl.constexpr,
    TOP_K: tl.constexpr,
    STORE_ACT: tl.constexpr,
    EPILOGUE_N: tl.constexpr,
):
    """Store what follows from `acc`, the product of tile `work`."""
    _, first_row, end_row = row_tile(tiles_ptr, num_row_tiles, work // COLUMN_TILES)
    column_tile = work % COLUMN_TILES
    rows, is_row, slot, _ = gathered_rows(slot_of_row_ptr, first_row, end_row, TOP_K, acc.shape[0])
    factor = tl.load(routing_weights_ptr + slot, mask=is_row, other=0.0).to(tl.float32)
    start = first_row.to(tl.int64)  # one number, and small offsets from it
    partial = _some_columns(
        acc, factor, tl.arange(0, acc.shape[0]), is_row, column_tile * acc.shape[1],
        hidden_ptr + start * (2 * F), d_hidden_ptr + start * (2 * F), scaled_act_ptr + start * F,
        F, STORE_ACT, EPILOGUE_N,
    )  # fmt: skip
    place = column_tile * num_slots.to(tl.int64) + rows
    tl.store(partial_ptr + place, partial, mask=is_row)


@triton.jit
def _some_columns(
    d_act,
    factor,
    rows,
    is_row,
    first_column,
    hidden_ptr,
    d_hidden_ptr,
    scaled_act_ptr,
    F: tl.constexpr,
    STORE_ACT: tl.constexpr,
    EPILOGUE_N: tl.constexpr,
):
    """Take `swiglu_gradient` EPILOGUE_N columns at a time; return <d_act, act> of every row.

    The pointers are to row 0 of `rows`.
    """
    if d_act.shape[1] > EPILOGUE_N:
        left, right = halves(d_act)
        d_factor = _some_columns(
            left, factor, rows, is_row, first_column, hidden_ptr, d_hidden_ptr, scaled_act_ptr,
            F, STORE_ACT, EPILOGUE_N,
        )  # fmt: skip
        d_factor += _some_columns(
            right, factor, rows, is_row, first_column + left.shape[1], hidden_ptr, d_hidden_ptr,
            scaled_act_ptr, F, STORE_ACT, EPILOGUE_N,
        )  # fmt: skip
    else:
        columns = first_column + tl.arange(0, d_act.shape[1])[None, :]
        mask = is_row[:, None] & (columns < F)
        d_factor, _, _ = swiglu_gradient(
            d_act, factor, rows[:, None], columns, mask,
            hidden_ptr, d_hidden_ptr, scaled_act_ptr, F, STORE_ACT,
        )  # fmt: skip
    return d_factor


def activation_gradient_launch(
    d_out_TD: torch.Tensor,
    down_proj_EDF: torch.Tensor,
    hidden_N2F: torch.Tensor,
    weights_TK: torch.Tensor,
    d_hidden_N2F: torch.Tensor,
    scaled_act_NF: torch.Tensor | None,
    partial_PN: torch.Tensor,
    slot_of_row: torch.Tensor,
    row_tiles: torch.Tensor,
    tiles: Tiles,
) -> Launch:
    """Return the launch that fills `d_hidden_N2F`, `scaled_act_NF` and `partial_PN`.

    Args:
        d_out_TD: (T, D) gradient of the block's output, contiguous.
        down_proj_EDF: (E, D, F) contiguous, the dtype of `d_out_TD`.
        hidden_N2F: (T * K, 2F) of the up stage.
        weights_TK: (T, K) routing weights, contiguous.
        d_hidden_N2F: (T * K, 2F).
        scaled_act_NF: (T * K, F) routing weight times act; None leaves it out.
        partial_PN: (`num_partials`, T * K) float32, sums to the routing weights' gradient per row.
        slot_of_row: of the `Routing`.
        row_tiles: map for `tiles.block_m`.
        tiles: the cut.
    """
    _, depth, width = down_proj_EDF.shape
    tiles = tiles.fit(columns=width, depth=depth)
    tma = tiles.tma and takes_tma(down_proj_EDF)
    weight = down_proj_EDF
    if tma:
        # A box of three dimensions ends in zeros where the expert ends, at any depth.
        weight = TensorDescriptor.from_tensor(down_proj_EDF, [1, tiles.block_k, tiles.block_n])
    num_row_tiles = row_tiles.shape[1]
    return Launch(
        _activation_gradient_kernel,
        grid_of(tiles, num_row_tiles * cdiv(width, tiles.block_n), d_out_TD),
        {
            "d_out_ptr": d_out_TD,
            "weight": weight,
            "hidden_ptr": hidden_N2F,
            "routing_weights_ptr": weights_TK,
            "d_hidden_ptr": d_hidden_N2F,
            "scaled_act_ptr": d_hidden_N2F if scaled_act_NF is None else scaled_act_NF,
            "partial_ptr": partial_PN,
            "slot_of_row_ptr": slot_of_row,
            "tiles_ptr": row_tiles,
            "num_row_tiles": num_row_tiles,
            "num_slots": len(slot_of_row),
            "D": depth,
            "F": width,
            "TOP_K": weights_TK.shape[1],
            "STORE_ACT": scaled_act_NF is not None,
            **cut_arguments(tiles, d_out_TD.dtype, tma=tma),
            **walk_arguments(tiles, tma=tma),
            "EPILOGUE_N": tiles.epilogue_n,
        },
        tiles.num_warps,
        tiles.num_stages,
    )


def num_partials(width: int, tiles: Tiles) -> int:
    """Return how many partial sums per row the stage writes for F = `width`."""
    return cdiv(width, tiles.fit(columns=width, depth=width).block_n)

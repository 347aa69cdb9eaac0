"""Gather the rows of each expert, multiply by gate and up projection, apply SwiGLU."""

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
from monkey_patch.kernels.scatter_moe.triton.swiglu import halves, swiglu
from monkey_patch.kernels.scatter_moe.triton.tiles import Tiles, takes_tma


@triton.jit(do_not_specialize=["num_row_tiles"])
def _up_kernel(
    x_ptr,
    weight,
    hidden_ptr,
    act_ptr,
    slot_of_row_ptr,
    tiles_ptr,
    num_row_tiles,
    D: tl.constexpr,
    F: tl.constexpr,
    TOP_K: tl.constexpr,
    STORE_HIDDEN: tl.constexpr,
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
    """Compute hidden = x[token] @ weight[e].T, gate before up, and silu(gate) * up."""
    COLUMN_TILES: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    num_tiles = tile_count(tiles_ptr, num_row_tiles) * COLUMN_TILES
    done = tl.program_id(0) - tl.num_programs(0)
    for work in tl.range(
        tl.program_id(0), num_tiles, tl.num_programs(0),
        flatten=PERSISTENT, warp_specialize=WARP_SPECIALIZE,
    ):  # fmt: skip
        # Column tiles of the same rows are neighbours, so that x comes from L2 after the first.
        expert, first_row, end_row = row_tile(tiles_ptr, num_row_tiles, work // COLUMN_TILES)
        column = (work % COLUMN_TILES) * BLOCK_N
        _, is_row, _, token = gathered_rows(slot_of_row_ptr, first_row, end_row, TOP_K, BLOCK_M)
        is_row = is_row[:, None]
        columns, ks = column + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
        x_ptrs = x_ptr + token[:, None] * D + ks[None, :]
        if TMA:
            # Gate and up rows as one operand of twice the width: half the instructions, and x
            # is read once from shared memory. A thread holds columns of both halves.
            both = tl.zeros((BLOCK_M, 2 * BLOCK_N), tl.float32)
            for k in range(0, D, BLOCK_K):
                x = load_gathered(x_ptrs, k, is_row, D, BLOCK_K)
                w = weight.load([2 * expert, column, k]).reshape(2 * BLOCK_N, BLOCK_K)
                both = tl.dot(x, w.T, both, input_precision=PRECISION)
            gate, up = halves(both)
        else:
            gate, up = _two_products(
                x_ptrs, is_row, weight, expert, columns, D, F, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
            )
        # From the map again: rows kept while the tile is multiplied would take registers.
        done += tl.num_programs(0)
        _, first_row, end_row = row_tile(tiles_ptr, num_row_tiles, done // COLUMN_TILES)
        rows = (first_row + tl.arange(0, BLOCK_M))[:, None]
        _some_columns(
            gate, up, rows, end_row, (done % COLUMN_TILES) * BLOCK_N, hidden_ptr, act_ptr,
            F, STORE_HIDDEN, STORE_ACT, EPILOGUE_N,
        )  # fmt: skip


@triton.jit
def _two_products(
    x_ptrs,
    is_row,
    weight_ptr,
    expert,
    columns,
    D: tl.constexpr,
    F: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Return the products with gate and up, whose rows are read through pointers."""
    is_column, ks = columns < F, tl.arange(0, BLOCK_K)
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    gate_rows = (expert.to(tl.int64) * (2 * F) + columns) * D
    w_ptrs = weight_ptr + gate_rows[None, :] + ks[:, None]
    for k in range(0, D, BLOCK_K):
        x = load_gathered(x_ptrs, k, is_row, D, BLOCK_K)
        is_weight = is_column[None, :] & (ks + k < D)[:, None]
        gate_w = tl.load(w_ptrs + k, mask=is_weight, other=0.0)
        up_w = tl.load(w_ptrs + k + F * D, mask=is_weight, other=0.0)
        gate = tl.dot(x, gate_w, gate, input_precision=PRECISION)
        up = tl.dot(x, up_w, up, input_precision=PRECISION)
    return gate, up


@triton.jit
def _some_columns(
    gate,
    up,
    rows,
    end_row,
    first_column,
    hidden_ptr,
    act_ptr,
    F: tl.constexpr,
    STORE_HIDDEN: tl.constexpr,
    STORE_ACT: tl.constexpr,
    EPILOGUE_N: tl.constexpr,
):
    """Store `swiglu` of a tile EPILOGUE_N columns at a time."""
    if gate.shape[1] > EPILOGUE_N:
        middle = first_column + gate.shape[1] // 2
        left_gate, right_gate = halves(gate)
        left_up, right_up = halves(up)
        _some_columns(
            left_gate, left_up, rows, end_row, first_column, hidden_ptr, act_ptr,
            F, STORE_HIDDEN, STORE_ACT, EPILOGUE_N,
        )  # fmt: skip
        _some_columns(
            right_gate, right_up, rows, end_row, middle, hidden_ptr, act_ptr,
            F, STORE_HIDDEN, STORE_ACT, EPILOGUE_N,
        )  # fmt: skip
    else:
        columns = first_column + tl.arange(0, gate.shape[1])[None, :]
        mask = (rows < end_row) & (columns < F)
        rows = rows.to(tl.int64)
        act = swiglu(gate, up, rows, columns, mask, hidden_ptr, F, STORE_HIDDEN)
        if STORE_ACT:
            act = act.to(act_ptr.dtype.element_ty)
            tl.store(act_ptr + rows * F + columns, act, mask=mask)


def up_launch(
    x_TD: torch.Tensor,
    gate_up_proj_E2FD: torch.Tensor,
    hidden_N2F: torch.Tensor | None,
    act_NF: torch.Tensor | None,
    slot_of_row: torch.Tensor,
    row_tiles: torch.Tensor,
    top_k: int,
    tiles: Tiles,
) -> Launch:
    """Return the launch that fills `hidden_N2F` and `act_NF`; None leaves one out.

    Args:
        x_TD: (T, D) contiguous.
        gate_up_proj_E2FD: (E, 2F, D) contiguous, the dtype of `x_TD`.
        hidden_N2F: (T * K, 2F) rows sorted by expert, gate before up.
        act_NF: (T * K, F) silu(gate) * up.
        slot_of_row: of the `Routing`.
        row_tiles: map for `tiles.block_m`.
        top_k: K.
        tiles: the cut.
    """
    num_experts, width, depth = gate_up_proj_E2FD.shape
    tiles = tiles.fit(columns=width // 2, depth=depth)
    tma = tiles.tma and takes_tma(gate_up_proj_E2FD)
    weight = gate_up_proj_E2FD
    if tma:
        halves = gate_up_proj_E2FD.view(num_experts * 2, width // 2, depth)
        weight = TensorDescriptor.from_tensor(halves, [2, tiles.block_n, tiles.block_k])
    num_row_tiles = row_tiles.shape[1]
    num_tiles = num_row_tiles * cdiv(width // 2, tiles.block_n)
    return Launch(
        _up_kernel,
        grid_of(tiles, num_tiles, x_TD),
        {
            "x_ptr": x_TD,
            "weight": weight,
            # A pointer that is not written through still tells the kernel the dtype to round to.
            "hidden_ptr": x_TD if hidden_N2F is None else hidden_N2F,
            "act_ptr": x_TD if act_NF is None else act_NF,
            "slot_of_row_ptr": slot_of_row,
            "tiles_ptr": row_tiles,
            "num_row_tiles": num_row_tiles,
            "D": depth,
            "F": width // 2,
            "TOP_K": top_k,
            "STORE_HIDDEN": hidden_N2F is not None,
            "STORE_ACT": act_NF is not None,
            **cut_arguments(tiles, x_TD.dtype, tma=tma),
            "EPILOGUE_N": tiles.epilogue_n if tiles.persistent else tiles.block_n,
            **walk_arguments(tiles, tma=tma),
        },
        tiles.num_warps,
        tiles.num_stages,
    )

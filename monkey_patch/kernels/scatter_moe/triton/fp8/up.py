"""Gather quantised rows, multiply by gate and up projection in FP8, apply SwiGLU, quantise act.

Gate and up are two accumulators of half a tile each: what is to be scaled takes registers beside
them, and with a whole tile of it at a time a thread has too few on sm_90.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from monkey_patch.kernels.launch import Launch, cdiv
from monkey_patch.kernels.scatter_moe.quantize import Quantized, QuantizedRows, Scaling
from monkey_patch.kernels.scatter_moe.triton.fp8.epilogue import store_block, store_blocks
from monkey_patch.kernels.scatter_moe.triton.fp8.scaling import (
    add_product,
    as_pointer,
    epilogue_columns,
    finish_product,
    fit,
    is_whole_blocks,
    scaling_arguments,
    weight_scales,
)
from monkey_patch.kernels.scatter_moe.triton.rows import gathered_rows, load_gathered, row_tile
from monkey_patch.kernels.scatter_moe.triton.swiglu import halves, swiglu, whole
from monkey_patch.kernels.scatter_moe.triton.tiles import Tiles, takes_tma


@triton.jit(do_not_specialize=["num_row_tiles"])
def _fp8_up_kernel(
    x_ptr,
    x_scales_ptr,
    weight,
    weights_scales_ptr,
    hidden_ptr,
    act_ptr,
    act_scales_ptr,
    slot_of_row_ptr,
    tiles_ptr,
    num_row_tiles,
    NUM_EXPERTS: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    TOP_K: tl.constexpr,
    STORE_HIDDEN: tl.constexpr,
    STORE_ACT: tl.constexpr,
    QUANTIZE_ACT: tl.constexpr,
    SCALING: tl.constexpr,
    TALL: tl.constexpr,
    SCALES: tl.constexpr,
    ONE_SCALE: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EPILOGUE_N: tl.constexpr,
):
    """Compute hidden = x[token] @ weight[e].T, gate before up, and silu(gate) * up."""
    COLUMN_TILES: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    HALF: tl.constexpr = BLOCK_N // 2
    # Column tiles of the same rows are neighbours, so that x comes from L2 after the first.
    work = tl.program_id(0)
    expert, first_row, end_row = row_tile(tiles_ptr, num_row_tiles, work // COLUMN_TILES)
    if expert < NUM_EXPERTS:
        column = (work % COLUMN_TILES) * BLOCK_N
        rows, is_row, _, token = gathered_rows(slot_of_row_ptr, first_row, end_row, TOP_K, BLOCK_M)
        token = token[:, None]
        gate0, gate1, up0, up1 = _gate_and_up(
            x_ptr, x_scales_ptr, weight, weights_scales_ptr, expert, token, is_row, column,
            D, F, SCALING, TALL, SCALES, ONE_SCALE, TMA, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        act0 = _some_columns(
            gate0, up0, hidden_ptr, act_ptr, rows, is_row, column,
            act_scales_ptr, F, STORE_HIDDEN, STORE_ACT and not QUANTIZE_ACT,
            QUANTIZE_ACT and SCALING != "blockwise", EPILOGUE_N,
        )  # fmt: skip
        act1 = _some_columns(
            gate1, up1, hidden_ptr, act_ptr, rows, is_row, column + HALF,
            act_scales_ptr, F, STORE_HIDDEN, STORE_ACT and not QUANTIZE_ACT,
            QUANTIZE_ACT and SCALING != "blockwise", EPILOGUE_N,
        )  # fmt: skip
        if QUANTIZE_ACT and SCALING == "blockwise":
            act = whole(act0, act1)
            store_block(act, rows, is_row, column, act_ptr, act_scales_ptr, F, EPILOGUE_N)


@triton.jit
def _gate_and_up(
    x_ptr,
    x_scales_ptr,
    weight,
    weights_scales_ptr,
    expert,
    token,
    is_row,
    column,
    D: tl.constexpr,
    F: tl.constexpr,
    SCALING: tl.constexpr,
    TALL: tl.constexpr,
    SCALES: tl.constexpr,
    ONE_SCALE: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Return the left and right half of a tile of gate, and those of up."""
    HALF: tl.constexpr = BLOCK_N // 2
    x_ptrs = x_ptr + token * D + tl.arange(0, BLOCK_K)[None, :]
    x_scale = x_scales_ptr + token * SCALES
    left = column if ONE_SCALE else tl.minimum(column + tl.arange(0, HALF), F - 1)[None, :]
    right = column if ONE_SCALE else tl.minimum(left + HALF, F - 1)
    gate0_scale = weight_scales(weights_scales_ptr, expert, left, 2 * F, TALL, SCALES)
    gate1_scale = weight_scales(weights_scales_ptr, expert, right, 2 * F, TALL, SCALES)
    up0_scale = weight_scales(weights_scales_ptr, expert, F + left, 2 * F, TALL, SCALES)
    up1_scale = weight_scales(weights_scales_ptr, expert, F + right, 2 * F, TALL, SCALES)
    gate0 = tl.zeros((token.shape[0], HALF), tl.float32)
    gate1 = tl.zeros((token.shape[0], HALF), tl.float32)
    up0 = tl.zeros((token.shape[0], HALF), tl.float32)
    up1 = tl.zeros((token.shape[0], HALF), tl.float32)
    for k in range(0, D, BLOCK_K):
        x = load_gathered(x_ptrs, k, is_row[:, None], D, BLOCK_K)
        w = _load_weight(weight, expert, 0, column, k, D, F, HALF, BLOCK_K, TMA)
        gate0 = add_product(gate0, x, w, x_scale, gate0_scale, k, SCALES, SCALING, BLOCK_K)
        w = _load_weight(weight, expert, 0, column + HALF, k, D, F, HALF, BLOCK_K, TMA)
        gate1 = add_product(gate1, x, w, x_scale, gate1_scale, k, SCALES, SCALING, BLOCK_K)
        w = _load_weight(weight, expert, 1, column, k, D, F, HALF, BLOCK_K, TMA)
        up0 = add_product(up0, x, w, x_scale, up0_scale, k, SCALES, SCALING, BLOCK_K)
        w = _load_weight(weight, expert, 1, column + HALF, k, D, F, HALF, BLOCK_K, TMA)
        up1 = add_product(up1, x, w, x_scale, up1_scale, k, SCALES, SCALING, BLOCK_K)
    gate0 = finish_product(gate0, x_scale, gate0_scale, SCALING)
    gate1 = finish_product(gate1, x_scale, gate1_scale, SCALING)
    up0 = finish_product(up0, x_scale, up0_scale, SCALING)
    up1 = finish_product(up1, x_scale, up1_scale, SCALING)
    return gate0, gate1, up0, up1


@triton.jit
def _load_weight(
    weight,
    expert,
    part,
    column,
    k,
    D: tl.constexpr,
    F: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
):
    """Load WIDTH columns of W.T from one on, of gate (part 0) or up (1), at depth k."""
    if TMA:
        w = weight.load([2 * expert + part, column, k]).reshape(WIDTH, BLOCK_K).T
    else:
        columns = (column + tl.arange(0, WIDTH))[None, :]
        ks = (k + tl.arange(0, BLOCK_K))[:, None]
        places = ((2 * expert + part).to(tl.int64) * F + columns) * D + ks
        w = tl.load(weight + places, mask=(columns < F) & (ks < D), other=0.0)
    return w


@triton.jit
def _some_columns(
    gate,
    up,
    hidden_ptr,
    act_ptr,
    rows,
    is_row,
    first_column,
    act_scales_ptr,
    F: tl.constexpr,
    STORE_HIDDEN: tl.constexpr,
    STORE_ACT: tl.constexpr,
    QUANTIZE_ACT: tl.constexpr,
    EPILOGUE_N: tl.constexpr,
):
    """Store what is wanted; return silu(gate) * up as rounded, 0 where the weight has no rows.

    With QUANTIZE_ACT act is stored in blocks of 32.
    """
    if gate.shape[1] > EPILOGUE_N:
        gate0, gate1 = halves(gate)
        up0, up1 = halves(up)
        left = _some_columns(
            gate0, up0, hidden_ptr, act_ptr, rows, is_row, first_column,
            act_scales_ptr, F, STORE_HIDDEN, STORE_ACT, QUANTIZE_ACT, EPILOGUE_N,
        )  # fmt: skip
        right = _some_columns(
            gate1, up1, hidden_ptr, act_ptr, rows, is_row, first_column + gate0.shape[1],
            act_scales_ptr, F, STORE_HIDDEN, STORE_ACT, QUANTIZE_ACT, EPILOGUE_N,
        )  # fmt: skip
        act = whole(left, right)
    else:
        columns = first_column + tl.arange(0, gate.shape[1])[None, :]
        mask = is_row[:, None] & (columns < F)
        places = rows.to(tl.int64)[:, None]
        act = swiglu(gate, up, places, columns, mask, hidden_ptr, F, STORE_HIDDEN)
        act = act.to(hidden_ptr.dtype.element_ty)
        if STORE_ACT:
            tl.store(act_ptr + places * F + columns, act, mask=mask)
        if QUANTIZE_ACT:
            store_blocks(act, rows, is_row, first_column, act_ptr, act_scales_ptr, F)
    return act


def fp8_up_launch(
    x: QuantizedRows,
    gate_up_proj: Quantized,
    hidden_N2F: torch.Tensor | None,
    act: QuantizedRows | torch.Tensor | None,
    slot_of_row: torch.Tensor,
    row_tiles: torch.Tensor,
    top_k: int,
    tiles: Tiles,
    *,
    scaling: Scaling,
) -> Launch:
    """Return the launch that fills `hidden_N2F` and `act`; None leaves one out.

    Args:
        x: (T, D) rows of the tokens.
        gate_up_proj: (E, 2F, D) values, contiguous, and their scales.
        hidden_N2F: (T * K, 2F) in the dtype of `x`, sorted by expert, gate before up.
        act: (T * K, F) silu(gate) * up, quantised where `quantizes_act`, else in the dtype of `x`.
        slot_of_row: of the `Routing`.
        row_tiles: map for `tiles.block_m`.
        top_k: K.
        tiles: the cut.
        scaling: of the operands.
    """
    num_experts, both, depth = gate_up_proj.values.shape
    width = both // 2
    tiles = fit(tiles, width, depth)
    tma = tiles.tma and takes_tma(gate_up_proj.values)
    weight = gate_up_proj.values
    if tma:
        by_part = weight.view(num_experts * 2, width, depth)
        weight = TensorDescriptor.from_tensor(by_part, [1, tiles.block_n // 2, tiles.block_k])
    # A pointer that is not written through still tells the kernel the dtype to round to.
    like = x.values.new_empty(0, dtype=x.dtype) if hidden_N2F is None else hidden_N2F
    act_NF, act_scales = act[:2] if isinstance(act, QuantizedRows) else (act, x.scales)
    num_row_tiles = row_tiles.shape[1]
    return Launch(
        _fp8_up_kernel,
        num_row_tiles * cdiv(width, tiles.block_n),
        {
            "x_ptr": x.values,
            "x_scales_ptr": as_pointer(x.scales),
            "weight": weight,
            "weights_scales_ptr": as_pointer(gate_up_proj.scales),
            "hidden_ptr": like,
            "act_ptr": like if act_NF is None else act_NF,
            "act_scales_ptr": as_pointer(act_scales),
            "slot_of_row_ptr": slot_of_row,
            "tiles_ptr": row_tiles,
            "num_row_tiles": num_row_tiles,
            "NUM_EXPERTS": num_experts,
            "D": depth,
            "F": width,
            "TOP_K": top_k,
            "STORE_HIDDEN": hidden_N2F is not None,
            "STORE_ACT": act is not None,
            "QUANTIZE_ACT": isinstance(act, QuantizedRows),
            **scaling_arguments(tiles, x.values, width, scaling=scaling, tma=tma),
            "EPILOGUE_N": epilogue_columns(tiles, scaling),
        },
        tiles.num_warps,
        tiles.num_stages,
    )


def quantizes_act(width: int, tiles: Tiles, scaling: Scaling) -> bool:
    """Tell whether a tile of the stage holds whole blocks of act for F = `width`.

    Blockwise the two halves of a tile are put together, in mxfp8 each is stored by itself.
    """
    tiles = tiles.fit(width, width)
    if scaling == "mxfp8":
        tiles = replace(tiles, block_n=tiles.block_n // 2)
    return is_whole_blocks(tiles, width, scaling)

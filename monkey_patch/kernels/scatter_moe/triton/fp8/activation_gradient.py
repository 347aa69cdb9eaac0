"""From the quantised gradient of the output to the gradient of the hidden rows, in both formats.

The product runs in FP8, the rest as in `triton/activation_gradient.py`: the gradient of the routing
weight is <d_out @ down[e], act>, and the epilogue takes a few columns of the tile at a time, since
with all of them at once it spills registers. A scale of d_hidden needs a whole block of it, which
is kept rounded to 16 bit: no more registers than the accumulators that it comes from.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from monkey_patch.kernels.launch import Launch, cdiv
from monkey_patch.kernels.scatter_moe.quantize import Quantized, QuantizedRows, Scaling, block_width
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
from monkey_patch.kernels.scatter_moe.triton.swiglu import halves, swiglu_gradient, whole
from monkey_patch.kernels.scatter_moe.triton.tiles import Tiles, takes_tma


@triton.jit(do_not_specialize=["num_row_tiles", "num_slots"])
def _fp8_activation_gradient_kernel(
    d_out_ptr,
    d_out_scales_ptr,
    weight,
    weights_scales_ptr,
    hidden_ptr,
    routing_weights_ptr,
    d_hidden_ptr,
    quantized_ptr,
    quantized_scales_ptr,
    scaled_act_ptr,
    partial_ptr,
    slot_of_row_ptr,
    tiles_ptr,
    num_row_tiles,
    num_slots,
    NUM_EXPERTS: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    TOP_K: tl.constexpr,
    STORE_ACT: tl.constexpr,
    QUANTIZE: tl.constexpr,
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
    """Compute d_out[token] @ weight[e].T and what follows from it."""
    COLUMN_TILES: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    work = tl.program_id(0)
    expert, first_row, end_row = row_tile(tiles_ptr, num_row_tiles, work // COLUMN_TILES)
    if expert < NUM_EXPERTS:
        column = (work % COLUMN_TILES) * BLOCK_N
        rows, is_row, slot, token = gathered_rows(
            slot_of_row_ptr, first_row, end_row, TOP_K, BLOCK_M
        )
        token = token[:, None]
        acc = _gathered_product(
            d_out_ptr, d_out_scales_ptr, weight, weights_scales_ptr, expert, token, is_row, column,
            D, F, SCALING, TALL, SCALES, ONE_SCALE, TMA, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        factor = tl.load(routing_weights_ptr + slot, mask=is_row, other=0.0).to(tl.float32)
        partial, d_gate, d_up = _some_columns(
            acc, factor, rows, is_row, column, hidden_ptr, d_hidden_ptr, scaled_act_ptr,
            quantized_ptr, quantized_scales_ptr, F, STORE_ACT,
            QUANTIZE and SCALING != "blockwise", EPILOGUE_N,
        )  # fmt: skip
        place = (work % COLUMN_TILES) * num_slots.to(tl.int64) + rows
        tl.store(partial_ptr + place, partial, mask=is_row)
        if QUANTIZE and SCALING == "blockwise":
            out_ptrs = quantized_ptr, quantized_scales_ptr
            store_block(d_gate, rows, is_row, column, *out_ptrs, 2 * F, EPILOGUE_N)
            store_block(d_up, rows, is_row, F + column, *out_ptrs, 2 * F, EPILOGUE_N)


@triton.jit
def _gathered_product(
    d_out_ptr,
    d_out_scales_ptr,
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
    """Return a tile of d_out[token] @ weight[e].T, weight being (E, F, D)."""
    columns = (column + tl.arange(0, BLOCK_N))[None, :]
    is_column = columns < F
    ks = tl.arange(0, BLOCK_K)
    d_out_ptrs = d_out_ptr + token * D + ks[None, :]
    row_scale = d_out_scales_ptr + token * SCALES
    scaled = column if ONE_SCALE else columns
    w_scale = weight_scales(weights_scales_ptr, expert, scaled, F, TALL, SCALES)
    if not TMA:
        w_ptrs = weight + (expert.to(tl.int64) * F + columns) * D + ks[:, None]
    acc = tl.zeros((token.shape[0], BLOCK_N), tl.float32)
    for k in range(0, D, BLOCK_K):
        d_out = load_gathered(d_out_ptrs, k, is_row[:, None], D, BLOCK_K)
        if TMA:
            w = weight.load([expert * F + column, k]).T
        else:
            is_weight = is_column & (ks + k < D)[:, None]
            w = tl.load(w_ptrs + k, mask=is_weight, other=0.0)
        acc = add_product(acc, d_out, w, row_scale, w_scale, k, SCALES, SCALING, BLOCK_K)
    return finish_product(acc, row_scale, w_scale, SCALING)


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
    quantized_ptr,
    quantized_scales_ptr,
    F: tl.constexpr,
    STORE_ACT: tl.constexpr,
    QUANTIZE: tl.constexpr,
    EPILOGUE_N: tl.constexpr,
):
    """Store d_hidden, also in blocks of 32 if QUANTIZE, and factor * act.

    Returns:
        <d_act, act> of every row, d_gate and d_up.
    """
    if d_act.shape[1] > EPILOGUE_N:
        left, right = halves(d_act)
        d_factor, left_gate, left_up = _some_columns(
            left, factor, rows, is_row, first_column, hidden_ptr, d_hidden_ptr, scaled_act_ptr,
            quantized_ptr, quantized_scales_ptr, F, STORE_ACT, QUANTIZE, EPILOGUE_N,
        )  # fmt: skip
        more, right_gate, right_up = _some_columns(
            right, factor, rows, is_row, first_column + left.shape[1], hidden_ptr,
            d_hidden_ptr, scaled_act_ptr, quantized_ptr, quantized_scales_ptr,
            F, STORE_ACT, QUANTIZE, EPILOGUE_N,
        )  # fmt: skip
        d_factor += more
        d_gate = whole(left_gate, right_gate)
        d_up = whole(left_up, right_up)
    else:
        columns = first_column + tl.arange(0, d_act.shape[1])[None, :]
        mask = is_row[:, None] & (columns < F)
        d_factor, d_gate, d_up = swiglu_gradient(
            d_act, factor, rows.to(tl.int64)[:, None], columns, mask,
            hidden_ptr, d_hidden_ptr, scaled_act_ptr, F, STORE_ACT,
        )  # fmt: skip
        if QUANTIZE:
            store_blocks(
                d_gate, rows, is_row, first_column, quantized_ptr, quantized_scales_ptr, 2 * F
            )
            store_blocks(
                d_up, rows, is_row, F + first_column, quantized_ptr, quantized_scales_ptr, 2 * F
            )
    return d_factor, d_gate, d_up


def fp8_activation_gradient_launch(
    d_out: QuantizedRows,
    down_proj: Quantized,
    hidden_N2F: torch.Tensor,
    weights_TK: torch.Tensor,
    d_hidden_N2F: torch.Tensor,
    quantized: QuantizedRows | None,
    scaled_act_NF: torch.Tensor | None,
    partial_PN: torch.Tensor,
    slot_of_row: torch.Tensor,
    row_tiles: torch.Tensor,
    tiles: Tiles,
    *,
    scaling: Scaling,
) -> Launch:
    """Return the launch that fills the four results before `slot_of_row`.

    Args:
        d_out: (T, D) gradient of the block's output.
        down_proj: (E, F, D) values of the transposed down projection, contiguous, and their scales.
        hidden_N2F: (T * K, 2F) of the up stage.
        weights_TK: (T, K) routing weights, contiguous.
        d_hidden_N2F: (T * K, 2F).
        quantized: (T * K, 2F) the same in FP8, where `quantizes_d_hidden`; None leaves it out.
        scaled_act_NF: (T * K, F) routing weight times act; None leaves it out.
        partial_PN: (`num_partials`, T * K) float32, sums to the routing weights' gradient per row.
        slot_of_row: of the `Routing`.
        row_tiles: map for `tiles.block_m`.
        tiles: the cut.
        scaling: of the operands.
    """
    num_experts, width, depth = down_proj.values.shape
    tiles = fit(tiles, width, depth)
    tma = tiles.tma and takes_tma(down_proj.values)
    weight = down_proj.values
    if tma:
        flat = weight.view(num_experts * width, depth)
        weight = TensorDescriptor.from_tensor(flat, [tiles.block_n, tiles.block_k])
    num_row_tiles = row_tiles.shape[1]
    # A pointer that is not written through is any.
    values, value_scales = d_out[:2] if quantized is None else quantized[:2]
    return Launch(
        _fp8_activation_gradient_kernel,
        num_row_tiles * cdiv(width, tiles.block_n),
        {
            "d_out_ptr": d_out.values,
            "d_out_scales_ptr": as_pointer(d_out.scales),
            "weight": weight,
            "weights_scales_ptr": as_pointer(down_proj.scales),
            "hidden_ptr": hidden_N2F,
            "routing_weights_ptr": weights_TK,
            "d_hidden_ptr": d_hidden_N2F,
            "quantized_ptr": values,
            "quantized_scales_ptr": as_pointer(value_scales),
            "scaled_act_ptr": d_hidden_N2F if scaled_act_NF is None else scaled_act_NF,
            "partial_ptr": partial_PN,
            "slot_of_row_ptr": slot_of_row,
            "tiles_ptr": row_tiles,
            "num_row_tiles": num_row_tiles,
            "num_slots": len(slot_of_row),
            "NUM_EXPERTS": num_experts,
            "D": depth,
            "F": width,
            "TOP_K": weights_TK.shape[1],
            "STORE_ACT": scaled_act_NF is not None,
            "QUANTIZE": quantized is not None,
            **scaling_arguments(tiles, d_out.values, scaling=scaling, tma=tma),
            "EPILOGUE_N": epilogue_columns(tiles, scaling),
        },
        tiles.num_warps,
        tiles.num_stages,
    )


def quantizes_d_hidden(width: int, tiles: Tiles, scaling: Scaling) -> bool:
    """Tell whether a tile of the stage holds whole blocks of gate and of up for F = `width`."""
    is_aligned = width % block_width(scaling, 2 * width) == 0
    return is_aligned and is_whole_blocks(tiles.fit(width, width), width, scaling)

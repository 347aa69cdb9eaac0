"""Multiply the sorted rows of each expert by its weight in FP8: down projection, input gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from monkey_patch.kernels.launch import Launch, cdiv
from monkey_patch.kernels.scatter_moe.quantize import Quantized, QuantizedRows, Scaling
from monkey_patch.kernels.scatter_moe.triton.fp8.scaling import (
    add_product,
    as_pointer,
    finish_product,
    fit,
    scaling_arguments,
    weight_scales,
)
from monkey_patch.kernels.scatter_moe.triton.rows import row_tile
from monkey_patch.kernels.scatter_moe.triton.tiles import Tiles, takes_tma


@triton.jit(do_not_specialize=["num_row_tiles"])
def _fp8_product_kernel(
    rows_in,
    rows_scales_ptr,
    weight,
    weights_scales_ptr,
    out_ptr,
    tiles_ptr,
    num_row_tiles,
    NUM_EXPERTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SCALING: tl.constexpr,
    TALL: tl.constexpr,
    SCALES: tl.constexpr,
    ONE_SCALE: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Multiply by weight[e].T, weight being (E, COLUMNS, DEPTH).

    With TMA a tile reads past the end of its expert, into rows and columns that are another's or
    undefined; they end in parts of the result that are not stored.
    """
    COLUMN_TILES: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    work = tl.program_id(0)
    expert, first_row, end_row = row_tile(tiles_ptr, num_row_tiles, work // COLUMN_TILES)
    if expert < NUM_EXPERTS:
        column = (work % COLUMN_TILES) * BLOCK_N
        rows = first_row + tl.arange(0, BLOCK_M)
        columns = (column + tl.arange(0, BLOCK_N))[None, :]
        ks = tl.arange(0, BLOCK_K)
        is_row = (rows < end_row)[:, None]
        is_column = columns < COLUMNS
        row_start = rows.to(tl.int64)[:, None]
        existing = tl.minimum(rows, end_row - 1).to(tl.int64)[:, None]
        row_scale = rows_scales_ptr + existing * SCALES
        scaled = column if ONE_SCALE else columns
        w_scale = weight_scales(weights_scales_ptr, expert, scaled, COLUMNS, TALL, SCALES)
        if not TMA:
            row_ptrs = rows_in + row_start * DEPTH + ks[None, :]
            w_ptrs = weight + (expert.to(tl.int64) * COLUMNS + columns) * DEPTH + ks[:, None]
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, DEPTH, BLOCK_K):
            if TMA:
                r = rows_in.load([first_row, k])
                w = weight.load([expert * COLUMNS + column, k]).T
            else:
                is_k = ks + k < DEPTH
                r = tl.load(row_ptrs + k, mask=is_row & is_k[None, :], other=0.0)
                w = tl.load(w_ptrs + k, mask=is_column & is_k[:, None], other=0.0)
            acc = add_product(acc, r, w, row_scale, w_scale, k, SCALES, SCALING, BLOCK_K)
        acc = finish_product(acc, row_scale, w_scale, SCALING)
        out_ptrs = out_ptr + row_start * COLUMNS + columns
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=is_row & is_column)


def fp8_product_launch(
    rows: QuantizedRows,
    weight: Quantized,
    out_NM: torch.Tensor,
    row_tiles: torch.Tensor,
    tiles: Tiles,
    *,
    scaling: Scaling,
) -> Launch:
    """Return the launch that fills `out_NM` with rows @ weight[e].T.

    Args:
        rows: (N, K) rows sorted by expert.
        weight: (E, M, K) values, contiguous, and their scales.
        out_NM: (N, M) in any float dtype.
        row_tiles: map for `tiles.block_m`.
        tiles: the cut.
        scaling: of the operands.
    """
    num_experts, columns, depth = weight.values.shape
    tiles = fit(tiles, columns, depth)
    tma = tiles.tma and takes_tma(rows.values, weight.values)
    rows_in, weight_in = rows.values, weight.values
    if tma:
        flat = weight.values.view(-1, depth)
        weight_in = TensorDescriptor.from_tensor(flat, [tiles.block_n, tiles.block_k])
        rows_in = TensorDescriptor.from_tensor(rows.values, [tiles.block_m, tiles.block_k])
    num_row_tiles = row_tiles.shape[1]
    return Launch(
        _fp8_product_kernel,
        num_row_tiles * cdiv(columns, tiles.block_n),
        {
            "rows_in": rows_in,
            "rows_scales_ptr": as_pointer(rows.scales),
            "weight": weight_in,
            "weights_scales_ptr": as_pointer(weight.scales),
            "out_ptr": out_NM,
            "tiles_ptr": row_tiles,
            "num_row_tiles": num_row_tiles,
            "NUM_EXPERTS": num_experts,
            "COLUMNS": columns,
            "DEPTH": depth,
            **scaling_arguments(tiles, weight.values, scaling=scaling, tma=tma),
        },
        tiles.num_warps,
        tiles.num_stages,
    )

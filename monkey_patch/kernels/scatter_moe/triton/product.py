"""Multiply the sorted rows of each expert by its weight: down projection, gradient of the rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from monkey_patch.kernels.launch import Launch, cdiv
from monkey_patch.kernels.scatter_moe.triton.rows import (
    cut_arguments,
    grid_of,
    row_tile,
    tile_count,
    walk_arguments,
)
from monkey_patch.kernels.scatter_moe.triton.tiles import Tiles, takes_tma


@triton.jit(do_not_specialize=["num_row_tiles"])
def _product_kernel(
    rows_in,
    weight,
    out_ptr,
    tiles_ptr,
    num_row_tiles,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PERSISTENT: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
):
    """Multiply by weight[e].T, weight being (E, COLUMNS, DEPTH), if TRANSPOSED, else by weight[e].

    With TMA a tile reads past the end of its expert, into rows that are another's or undefined;
    they end in rows of the result that are not stored.
    """
    COLUMN_TILES: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    num_tiles = tile_count(tiles_ptr, num_row_tiles) * COLUMN_TILES
    for work in tl.range(
        tl.program_id(0), num_tiles, tl.num_programs(0),
        flatten=PERSISTENT, warp_specialize=WARP_SPECIALIZE,
    ):  # fmt: skip
        expert, first_row, end_row = row_tile(tiles_ptr, num_row_tiles, work // COLUMN_TILES)
        column = (work % COLUMN_TILES) * BLOCK_N
        rows = first_row + tl.arange(0, BLOCK_M)
        columns = column + tl.arange(0, BLOCK_N)
        ks = tl.arange(0, BLOCK_K)
        is_row = (rows < end_row)[:, None]
        is_column = (columns < COLUMNS)[None, :]
        row_start = rows.to(tl.int64)[:, None]
        if not TMA:
            row_ptrs = rows_in + row_start * DEPTH + ks[None, :]
            if TRANSPOSED:
                places = (expert.to(tl.int64) * COLUMNS + columns[None, :]) * DEPTH + ks[:, None]
            else:
                places = (expert.to(tl.int64) * DEPTH + ks[:, None]) * COLUMNS + columns[None, :]
            w_ptrs = weight + places
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, DEPTH, BLOCK_K):
            if TMA:
                r = rows_in.load([first_row, k])
                if TRANSPOSED:
                    w = weight.load([expert * COLUMNS + column, k]).T
                else:
                    w = weight.load([expert, k, column]).reshape(BLOCK_K, BLOCK_N)
            else:
                is_k = ks + k < DEPTH
                r = tl.load(row_ptrs + k, mask=is_row & is_k[None, :], other=0.0)
                step = k if TRANSPOSED else k * COLUMNS
                w = tl.load(w_ptrs + step, mask=is_column & is_k[:, None], other=0.0)
            acc = tl.dot(r, w, acc, input_precision=PRECISION)
        out_ptrs = out_ptr + row_start * COLUMNS + columns[None, :]
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=is_row & is_column)


def product_launch(
    rows_NK: torch.Tensor,
    weight: torch.Tensor,
    out_NM: torch.Tensor,
    row_tiles: torch.Tensor,
    tiles: Tiles,
    *,
    transposed: bool,
) -> Launch:
    """Return the launch that fills `out_NM`.

    Args:
        rows_NK: (N, depth) rows sorted by expert, contiguous.
        weight: (E, columns, depth) if `transposed`, else (E, depth, columns); contiguous.
        out_NM: (N, columns).
        row_tiles: map for `tiles.block_m`.
        tiles: the cut.
        transposed: multiply by the transposed weight.
    """
    columns, depth = out_NM.shape[1], rows_NK.shape[1]
    tiles = tiles.fit(columns, depth)
    tma = tiles.tma and takes_tma(rows_NK, weight)
    rows_in, weight_in = rows_NK, weight
    if tma and transposed:
        flat = weight.view(-1, depth)
        weight_in = TensorDescriptor.from_tensor(flat, [tiles.block_n, tiles.block_k])
    elif tma:
        # A box of three dimensions ends in zeros where the expert ends, at any depth.
        weight_in = TensorDescriptor.from_tensor(weight, [1, tiles.block_k, tiles.block_n])
    if tma:
        rows_in = TensorDescriptor.from_tensor(rows_NK, [tiles.block_m, tiles.block_k])
    num_row_tiles = row_tiles.shape[1]
    return Launch(
        _product_kernel,
        grid_of(tiles, num_row_tiles * cdiv(columns, tiles.block_n), rows_NK),
        {
            "rows_in": rows_in,
            "weight": weight_in,
            "out_ptr": out_NM,
            "tiles_ptr": row_tiles,
            "num_row_tiles": num_row_tiles,
            "COLUMNS": columns,
            "DEPTH": depth,
            "TRANSPOSED": transposed,
            **cut_arguments(tiles, rows_NK.dtype, tma=tma),
            **walk_arguments(tiles, tma=tma),
        },
        tiles.num_warps,
        tiles.num_stages,
    )

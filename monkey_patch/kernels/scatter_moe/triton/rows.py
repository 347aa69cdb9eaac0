"""What the stages share that work on row tiles."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from monkey_patch.kernels.scatter_moe.routing import Routing, num_row_tiles
from monkey_patch.kernels.scatter_moe.triton.routing import tile_launch
from monkey_patch.kernels.scatter_moe.triton.tiles import Tiles


@triton.jit
def row_tile(tiles_ptr, num_row_tiles, tile):
    """Return expert (E past the last tile), first row, and end row of the expert."""
    expert = tl.load(tiles_ptr + tile)
    first_row = tl.load(tiles_ptr + num_row_tiles + tile)
    end_row = tl.load(tiles_ptr + 2 * num_row_tiles + tile)
    return expert, first_row, end_row


@triton.jit
def tile_count(tiles_ptr, num_row_tiles):
    """Return how many of the row tiles there are; `num_row_tiles` is their bound."""
    return tl.load(tiles_ptr + 3 * num_row_tiles)


@triton.jit
def gathered_rows(slot_of_row_ptr, first_row, end_row, TOP_K: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return rows of a tile, which exist, their slots (0 where none does), and tokens in int64."""
    rows = first_row + tl.arange(0, BLOCK_M)
    is_row = rows < end_row
    slot = tl.load(slot_of_row_ptr + rows, mask=is_row, other=0)
    return rows, is_row, slot, (slot // TOP_K).to(tl.int64)


@triton.jit
def load_gathered(row_ptrs, k, is_row, DEPTH: tl.constexpr, BLOCK_K: tl.constexpr):
    """Load columns k to k + BLOCK_K of gathered rows, zeros where there is none."""
    mask = is_row
    if DEPTH % BLOCK_K != 0:
        mask = is_row & (tl.arange(0, BLOCK_K) + k < DEPTH)[None, :]
    return tl.load(row_ptrs + k, mask=mask, other=0.0)


class RowTiles:
    """Maps from tile to expert and rows, one per tile height, made once for all stages."""

    def __init__(self, routing: Routing):
        self.routing = routing
        self._maps: dict[int, torch.Tensor] = {}

    def map(self, block_m: int) -> torch.Tensor:
        """Return the (4, num_row_tiles) int32 map; launches a kernel at first use."""
        if block_m not in self._maps:
            tiles, launch = self.new(block_m)
            launch.run()
            self._maps[block_m] = tiles
        return self._maps[block_m]

    def new(self, block_m: int) -> tuple[torch.Tensor, Any]:
        """Return an empty map and the launch that fills it."""
        num_slots, num_experts = len(self.routing.slot_of_row), len(self.routing.offsets) - 1
        count = num_row_tiles(num_slots, num_experts, block_m)
        tiles = self.routing.offsets.new_empty((4, count))
        return tiles, tile_launch(self.routing, block_m, tiles)


def grid_of(tiles: Tiles, num_tiles: int, tensor: torch.Tensor) -> int:
    """Return the number of programs for `num_tiles` tiles."""
    if not (tiles.persistent and tensor.is_cuda):
        return num_tiles
    device = torch.cuda.get_device_properties(tensor.device)
    return min(num_tiles, tiles.programs * device.multi_processor_count)


def cut_arguments(tiles: Tiles, dtype: torch.dtype, *, tma: bool) -> dict[str, Any]:
    """Return what every product is told about its cut and its precision.

    float32 follows torch.set_float32_matmul_precision.
    """
    is_exact = dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return {
        "TMA": tma,
        "PRECISION": "ieee" if is_exact else "tf32",
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_K": tiles.block_k,
    }


def walk_arguments(tiles: Tiles, *, tma: bool) -> dict[str, Any]:
    """Return how a product on row tiles goes from tile to tile.

    Nothing but descriptors is loaded by warps of its own, so without them there is nothing to part.
    """
    return {"PERSISTENT": tiles.persistent, "WARP_SPECIALIZE": tiles.warp_specialize and tma}

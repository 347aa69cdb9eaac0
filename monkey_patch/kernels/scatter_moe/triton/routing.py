"""Which row belongs to which expert: a stable counting sort and the map of row tiles.

Slot t * K + k is the k-th choice of token t; row n is a place in the order sorted by expert. Three
kernels count the slots of each block per expert, turn the counts into positions, and place the
slots; a fourth cuts the rows of every expert into tiles. No atomics, so the order within an expert
is the order of the slots, and nothing is read back by the host: the number of tiles is a bound that
depends on shapes only, and surplus tiles carry an expert index of E.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from monkey_patch.kernels.launch import Launch, cdiv, next_power_of_2
from monkey_patch.kernels.scatter_moe.routing import Routing

# Elements of the (slots, experts) table that one program holds in registers: 128 int32 per thread.
_TABLE = 128 * 128
_MOST_TILES = 64  # of one program that maps them; of 512 experts only as many as fit the table


@triton.jit(do_not_specialize=["num_slots"])
def _count_kernel(
    index_ptr,
    counts_ptr,
    num_slots,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """counts[block, e] = slots of the block that chose expert e."""
    block = tl.program_id(0)
    slot = block * SLOTS + tl.arange(0, SLOTS)
    expert = tl.load(index_ptr + slot, mask=slot < num_slots, other=NUM_EXPERTS)
    experts = tl.arange(0, EXPERTS)
    # A sentinel may equal the index of a padding column; nobody reads those.
    chosen = (expert[:, None] == experts[None, :]).to(tl.int32)
    tl.store(counts_ptr + block * EXPERTS + experts, tl.sum(chosen, axis=0))


@triton.jit(do_not_specialize=["num_blocks"])
def _scan_kernel(
    counts_ptr,
    totals_ptr,
    num_blocks,
    EXPERTS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Replace counts by their exclusive sum over earlier blocks; totals[e] is the whole sum."""
    experts = tl.program_id(0) * GROUP + tl.arange(0, GROUP)
    carry = tl.zeros((GROUP,), tl.int32)
    for first in range(0, num_blocks, BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        place = counts_ptr + block[:, None] * EXPERTS + experts[None, :]
        is_block = (block < num_blocks)[:, None]
        count = tl.load(place, mask=is_block, other=0)
        before = tl.cumsum(count, axis=0) - count + carry[None, :]
        tl.store(place, before, mask=is_block)
        carry += tl.sum(count, axis=0)
    tl.store(totals_ptr + experts, carry)


@triton.jit(do_not_specialize=["num_slots"])
def _place_kernel(
    index_ptr,
    before_ptr,
    totals_ptr,
    offsets_ptr,
    slot_of_row_ptr,
    row_of_slot_ptr,
    num_slots,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Give every slot its row; -1 to slots whose index is no expert. Block 0 writes the offsets."""
    block = tl.program_id(0)
    experts = tl.arange(0, EXPERTS)
    total = tl.load(totals_ptr + experts, mask=experts < NUM_EXPERTS, other=0)
    start = tl.cumsum(total, axis=0) - total
    if block == 0:
        tl.store(offsets_ptr + experts, start, mask=experts < NUM_EXPERTS)
        tl.store(offsets_ptr + NUM_EXPERTS, tl.sum(total, axis=0))

    slot = block * SLOTS + tl.arange(0, SLOTS)
    is_slot = slot < num_slots
    expert = tl.load(index_ptr + slot, mask=is_slot, other=NUM_EXPERTS)
    chosen = (expert[:, None] == experts[None, :]).to(tl.int32)
    earlier = tl.cumsum(chosen, axis=0) - chosen
    base = start + tl.load(before_ptr + block * EXPERTS + experts)
    row = tl.sum(chosen * (earlier + base[None, :]), axis=1)
    is_routed = (expert >= 0) & (expert < NUM_EXPERTS)
    tl.store(row_of_slot_ptr + slot, tl.where(is_routed, row, -1), mask=is_slot)
    tl.store(slot_of_row_ptr + row, slot, mask=is_slot & is_routed)


@triton.jit(do_not_specialize=["num_tiles"])
def _tile_kernel(
    offsets_ptr,
    tiles_ptr,
    num_tiles,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILES: tl.constexpr,
):
    """tiles[:, i] = expert, first row, end row (of the expert) of tile i; number of all tiles."""
    experts = tl.arange(0, EXPERTS)
    is_expert = experts < NUM_EXPERTS
    start = tl.load(offsets_ptr + experts, mask=is_expert, other=0)
    end = tl.load(offsets_ptr + experts + 1, mask=is_expert, other=0)
    tiles = (end - start + BLOCK_M - 1) // BLOCK_M
    last = tl.cumsum(tiles, axis=0)

    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    expert = tl.sum((last[None, :] <= tile[:, None]).to(tl.int32), axis=1)
    mine = (experts[None, :] == expert[:, None]).to(tl.int32)
    # Row of the tile: start of the expert plus BLOCK_M for each of the expert's earlier tiles.
    base = tl.sum(mine * (start - (last - tiles) * BLOCK_M)[None, :], axis=1)
    is_tile = tile < num_tiles
    tl.store(tiles_ptr + tile, tl.minimum(expert, NUM_EXPERTS), mask=is_tile)
    tl.store(tiles_ptr + num_tiles + tile, base + tile * BLOCK_M, mask=is_tile)
    tl.store(tiles_ptr + 2 * num_tiles + tile, tl.sum(mine * end[None, :], axis=1), mask=is_tile)
    count = tl.zeros((TILES,), tl.int32) + tl.sum(tiles, axis=0)
    tl.store(tiles_ptr + 3 * num_tiles + tile, count, mask=is_tile)


def sort_launches(index_TK: torch.Tensor, num_experts: int, routing: Routing) -> list[Launch]:
    """Return the launches that fill `routing` from the experts chosen.

    Args:
        index_TK: (T, K) contiguous integers; outside [0, E) is no expert.
        num_experts: E.
        routing: buffers of `new_routing`.
    """
    num_slots, experts = index_TK.numel(), next_power_of_2(num_experts)
    slots = max(16, _TABLE // experts)
    # One block even without slots: it writes the offsets.
    num_blocks, group = max(1, cdiv(num_slots, slots)), min(16, experts)
    counts = index_TK.new_empty((num_blocks, experts), dtype=torch.int32)
    totals = index_TK.new_empty(experts, dtype=torch.int32)
    shape = {"NUM_EXPERTS": num_experts, "EXPERTS": experts, "SLOTS": slots}
    slot_arguments = {"index_ptr": index_TK, "num_slots": num_slots, **shape}
    return [
        Launch(_count_kernel, num_blocks, {**slot_arguments, "counts_ptr": counts}),
        Launch(
            _scan_kernel,
            experts // group,
            {
                "counts_ptr": counts,
                "totals_ptr": totals,
                "num_blocks": num_blocks,
                "EXPERTS": experts,
                "GROUP": group,
                "BLOCKS": 256,
            },
        ),
        Launch(
            _place_kernel,
            num_blocks,
            {
                **slot_arguments,
                "before_ptr": counts,
                "totals_ptr": totals,
                "offsets_ptr": routing.offsets,
                "slot_of_row_ptr": routing.slot_of_row,
                "row_of_slot_ptr": routing.row_of_slot,
            },
        ),
    ]


def tile_launch(routing: Routing, block_m: int, tiles: torch.Tensor) -> Launch:
    """Return the launch that fills `tiles`, the (4, num_row_tiles) int32 map for `block_m` rows."""
    num_experts, num_tiles = routing.offsets.numel() - 1, tiles.shape[1]
    experts = next_power_of_2(num_experts)
    per_program = max(16, min(_MOST_TILES, _TABLE // experts))
    return Launch(
        _tile_kernel,
        cdiv(num_tiles, per_program),
        {
            "offsets_ptr": routing.offsets,
            "tiles_ptr": tiles,
            "num_tiles": num_tiles,
            "NUM_EXPERTS": num_experts,
            "EXPERTS": experts,
            "BLOCK_M": block_m,
            "TILES": per_program,
        },
    )

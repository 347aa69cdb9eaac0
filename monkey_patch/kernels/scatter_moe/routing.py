"""The order of the routed rows, shared by every backend."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Routing(NamedTuple):
    """A permutation between slots (t * K + k) and rows sorted by expert, stable within an expert.

    Attributes:
        offsets: (E + 1,) int32; expert e owns rows offsets[e] to offsets[e + 1].
        slot_of_row: (T * K,) int32; undefined from offsets[E] on.
        row_of_slot: (T * K,) int32; -1 for a slot whose index is no expert.
    """

    offsets: torch.Tensor
    slot_of_row: torch.Tensor
    row_of_slot: torch.Tensor


def new_routing(index_TK: torch.Tensor, num_experts: int) -> Routing:
    """Return uninitialised buffers for the routing of `index_TK`."""
    num_slots = index_TK.numel()
    sizes = (num_experts + 1, num_slots, num_slots)
    return Routing(*(index_TK.new_empty(size, dtype=torch.int32) for size in sizes))


def num_row_tiles(num_slots: int, num_experts: int, block_m: int) -> int:
    """Return the most row tiles of `block_m` rows that any routing of `num_slots` slots needs."""
    return num_slots // block_m + min(num_experts, num_slots)

"""Every launch of a forward and backward pass, on meta tensors: to compile before there is data."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from monkey_patch.kernels.launch import Launch
from monkey_patch.kernels.scatter_moe.routing import Routing, new_routing
from monkey_patch.kernels.scatter_moe.triton.activation_gradient import (
    activation_gradient_launch,
    num_partials,
)
from monkey_patch.kernels.scatter_moe.triton.combine import combine_launch, routing_gradient_launch
from monkey_patch.kernels.scatter_moe.triton.product import product_launch
from monkey_patch.kernels.scatter_moe.triton.routing import sort_launches
from monkey_patch.kernels.scatter_moe.triton.rows import RowTiles
from monkey_patch.kernels.scatter_moe.triton.tiles import STAGES, Tiles
from monkey_patch.kernels.scatter_moe.triton.up import up_launch
from monkey_patch.kernels.scatter_moe.triton.weight_gradient import weight_gradient_launch


class Shape(NamedTuple):
    """Sizes of one expert block."""

    tokens: int
    top_k: int
    experts: int
    hidden: int
    intermediate: int


# Qwen3-30B-A3B at 32k tokens.
QWEN3_30B = Shape(32768, 8, 128, 2048, 768)


class _Buffers:
    """Meta tensors by their role."""

    def __init__(self, shape: Shape, dtype: torch.dtype, weight_dtype: torch.dtype):
        tokens, top_k, experts, hidden, intermediate = self.shape = shape
        rows = tokens * top_k

        def empty(*sizes: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.empty(sizes, dtype=dtype, device="meta")

        self.empty = empty
        self.x, self.rows_out = empty(tokens, hidden), empty(rows, hidden)
        self.hidden, self.act = empty(rows, 2 * intermediate), empty(rows, intermediate)
        self.gate_up, self.down = (
            empty(experts, 2 * intermediate, hidden),
            empty(experts, hidden, intermediate),
        )
        self.d_gate_up = empty(*self.gate_up.shape, dtype=weight_dtype)
        self.d_down = empty(*self.down.shape, dtype=weight_dtype)
        self.index = empty(tokens, top_k, dtype=torch.int64)
        self.weights = empty(tokens, top_k)
        self.routing: Routing = new_routing(self.index, experts)
        self.row_tiles = RowTiles(self.routing)


def launches(
    shape: Shape,
    choose: Callable[[str], Tiles],
    dtype: torch.dtype = torch.bfloat16,
    weight_dtype: torch.dtype | None = None,
    *,
    recompute_hidden: bool = False,
) -> dict[str, list[Launch]]:
    """Return the launches by stage: the five of `tiles.STAGES`, "routing" and "combine".

    Args:
        shape: sizes of the block.
        choose: stage name -> cut, such as a lookup in the shipped table.
        dtype: of activations and products.
        weight_dtype: of the weights' gradients; `dtype` if None.
        recompute_hidden: two launches of "up", each with one result, instead of one with both.
    """
    b = _Buffers(shape, dtype, weight_dtype or dtype)
    slots, top_k = b.routing.slot_of_row, shape.top_k
    up, down, gradient, inputs, weights = map(choose, STAGES)
    heights = {tiles.block_m for tiles in (up, down, gradient, inputs)}
    partials = b.empty(num_partials(shape.intermediate, gradient), len(slots), dtype=torch.float32)

    gradient_stage = activation_gradient_launch(
        b.x, b.down, b.hidden, b.weights, b.hidden, b.act, partials, slots,
        _map(b, gradient), gradient,
    )  # fmt: skip

    def up_stage(hidden: torch.Tensor | None, act: torch.Tensor | None) -> Launch:
        return up_launch(b.x, b.gate_up, hidden, act, slots, _map(b, up), top_k, up)

    def expert_gradient(
        left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, *, gather_left: bool
    ) -> Launch:
        return weight_gradient_launch(
            left, right, out, slots, b.routing.offsets, top_k, weights,
            gather_left=gather_left, accumulate=False,
        )  # fmt: skip

    return {
        "routing": [
            *sort_launches(b.index, shape.experts, b.routing),
            *(b.row_tiles.new(height)[1] for height in sorted(heights)),
        ],
        "up": [up_stage(None, b.act), up_stage(b.hidden, None)]
        if recompute_hidden
        else [up_stage(b.hidden, b.act)],
        "down": [product_launch(b.act, b.down, b.rows_out, _map(b, down), down, transposed=True)],
        "combine": [
            combine_launch(b.rows_out, b.weights, b.routing.row_of_slot, b.x, top_k),
            combine_launch(b.rows_out, None, b.routing.row_of_slot, b.x, top_k),
            routing_gradient_launch(partials, b.routing.row_of_slot, b.weights),
        ],
        "activation_gradient": [gradient_stage],
        "input_gradient": [
            product_launch(
                b.hidden, b.gate_up, b.rows_out, _map(b, inputs), inputs, transposed=False
            )
        ],
        "weight_gradient": [
            expert_gradient(b.hidden, b.x, b.d_gate_up, gather_left=False),
            expert_gradient(b.x, b.act, b.d_down, gather_left=True),
        ],
    }


def _map(buffers: _Buffers, tiles: Tiles) -> torch.Tensor:
    return buffers.row_tiles.new(tiles.block_m)[0]

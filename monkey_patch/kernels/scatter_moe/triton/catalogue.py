"""Every launch of a forward and backward pass, on meta tensors: to compile before there is data."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from monkey_patch.kernels.launch import Launch
from monkey_patch.kernels.scatter_moe.quantize import Fp8, Quantized, QuantizedRows, Scaling
from monkey_patch.kernels.scatter_moe.routing import Routing, new_routing
from monkey_patch.kernels.scatter_moe.triton.activation_gradient import (
    activation_gradient_launch,
    num_partials,
)
from monkey_patch.kernels.scatter_moe.triton.combine import combine_launch, routing_gradient_launch
from monkey_patch.kernels.scatter_moe.triton.fp8.activation_gradient import (
    fp8_activation_gradient_launch,
    quantizes_d_hidden,
)
from monkey_patch.kernels.scatter_moe.triton.fp8.product import fp8_product_launch
from monkey_patch.kernels.scatter_moe.triton.fp8.quantize import (
    new_quantized,
    new_quantized_rows,
    new_quantized_weight,
    quantize_rows_launch,
    quantize_weight_launches,
)
from monkey_patch.kernels.scatter_moe.triton.fp8.up import fp8_up_launch, quantizes_act
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
    fp8: Fp8 = "off",
) -> dict[str, list[Launch]]:
    """Return the launches by stage: the five of `tiles.STAGES`, "routing" and "combine".

    In FP8 also "quantize", and the products with a weight are those in `triton/fp8/`.

    Args:
        shape: sizes of the block.
        choose: stage name -> cut, such as a lookup in the shipped table.
        dtype: of activations and products.
        weight_dtype: of the weights' gradients; `dtype` if None.
        recompute_hidden: two launches of "up", each with one result, instead of one with both.
        fp8: scaling of the operands of the products with a weight.
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

    by_stage = {
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
    if fp8 == "off":
        return by_stage
    cuts = up, down, gradient, inputs
    return by_stage | _fp8_launches(b, cuts, fp8, partials, recompute_hidden=recompute_hidden)


def _fp8_launches(
    b: _Buffers,
    cuts: tuple[Tiles, Tiles, Tiles, Tiles],
    fp8: Scaling,
    partials: torch.Tensor,
    *,
    recompute_hidden: bool,
) -> dict[str, list[Launch]]:
    """Return the launches of the stages whose operands are in FP8, and of what quantises."""
    slots, width = b.routing.slot_of_row, b.shape.intermediate
    up, down, gradient, inputs = cuts
    up_weight, down_weight = (new_quantized(w, fp8) for w in (b.gate_up, b.down))
    up_turned, down_turned = (new_quantized(w.mT, fp8) for w in (b.gate_up, b.down))
    x, act, d_hidden = (new_quantized_rows(t.shape, t, fp8) for t in (b.x, b.act, b.hidden))
    fuses_act = quantizes_act(width, up, fp8)
    fuses_d_hidden = quantizes_d_hidden(width, gradient, fp8)

    def up_stage(hidden: torch.Tensor | None, *, with_act: bool) -> Launch:
        return fp8_up_launch(
            x, up_weight, hidden, (act if fuses_act else b.act) if with_act else None,
            slots, _map(b, up), b.shape.top_k, up, scaling=fp8,
        )  # fmt: skip

    def product(rows: QuantizedRows, weight: Quantized, tiles: Tiles) -> Launch:
        return fp8_product_launch(rows, weight, b.rows_out, _map(b, tiles), tiles, scaling=fp8)

    gradient_stage = fp8_activation_gradient_launch(
        x, down_turned, b.hidden, b.weights, b.hidden, d_hidden if fuses_d_hidden else None,
        b.act, partials, slots, _map(b, gradient), gradient, scaling=fp8,
    )  # fmt: skip
    return {
        "quantize": _quantize_launches(
            b, fp8, recompute_hidden, act=not fuses_act, d_hidden=not fuses_d_hidden
        ),
        "up": [up_stage(None, with_act=True), up_stage(b.hidden, with_act=False)]
        if recompute_hidden
        else [up_stage(b.hidden, with_act=True)],
        "down": [product(act, down_weight, down)],
        "activation_gradient": [gradient_stage],
        "input_gradient": [product(d_hidden, up_turned, inputs)],
    }


def _quantize_launches(
    b: _Buffers, fp8: Scaling, recompute_hidden: bool, *, act: bool, d_hidden: bool
) -> list[Launch]:
    rows = [b.x, *([b.act] if act else []), *([b.hidden] if d_hidden else [])]
    found = [quantize_rows_launch(t, new_quantized_rows(t.shape, t, fp8), fp8) for t in rows]
    forward, backward = {"forward": True, "backward": False}, {"forward": False, "backward": True}
    again = {"forward": recompute_hidden, "backward": True}
    for weight, ways in ((b.d_gate_up, (forward, again)), (b.d_down, (forward, backward))):
        for way in ways:
            out = new_quantized_weight(weight, fp8, **way)
            found += quantize_weight_launches(weight, out, fp8)
    return found


def _map(buffers: _Buffers, tiles: Tiles) -> torch.Tensor:
    return buffers.row_tiles.new(tiles.block_m)[0]

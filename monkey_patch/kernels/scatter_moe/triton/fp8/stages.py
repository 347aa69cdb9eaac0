"""The stages in FP8 on Triton: allocate the result, choose the cut, launch."""

from __future__ import annotations

from functools import partial

import torch

from monkey_patch.kernels.scatter_moe.quantize import (
    HiddenGradient,
    Quantized,
    QuantizedRows,
    QuantizedWeight,
    Scaling,
)
from monkey_patch.kernels.scatter_moe.routing import Routing
from monkey_patch.kernels.scatter_moe.triton.activation_gradient import num_partials
from monkey_patch.kernels.scatter_moe.triton.combine import routing_gradient_launch
from monkey_patch.kernels.scatter_moe.triton.fp8.activation_gradient import (
    fp8_activation_gradient_launch,
    quantizes_d_hidden,
)
from monkey_patch.kernels.scatter_moe.triton.fp8.product import fp8_product_launch
from monkey_patch.kernels.scatter_moe.triton.fp8.quantize import (
    new_quantized_rows,
    new_quantized_weight,
    quantize_rows_launch,
    quantize_weight_launches,
)
from monkey_patch.kernels.scatter_moe.triton.fp8.up import fp8_up_launch, quantizes_act
from monkey_patch.kernels.scatter_moe.triton.stages import TritonStages, sort_by_expert
from monkey_patch.kernels.scatter_moe.triton.tiles import Tiles, architecture_of, choose_tiles
from monkey_patch.kernels.scatter_moe.triton.warm_up import warm_up


class TritonFp8Stages:
    """The stages of one pass over one routing, blockwise; as `plain_fp8.PlainFp8Stages`.

    What multiplies no weight is done by the stages without FP8.
    """

    scaling: Scaling = "blockwise"
    sort_by_expert = staticmethod(sort_by_expert)
    warm_up = staticmethod(partial(warm_up, fp8="blockwise"))

    def __init__(self, routing: Routing, top_k: int):
        self.routing = routing
        self.top_k = top_k
        self.full = TritonStages(routing, top_k)
        self.combine = self.full.combine
        self.down_gradient = self.full.down_gradient
        self.row_tiles = self.full.row_tiles

    def tiles(self, stage: str, operand: torch.Tensor) -> Tiles:
        """Choose the cut of a stage."""
        rows = len(self.routing.slot_of_row) // (len(self.routing.offsets) - 1)
        return choose_tiles(stage, architecture_of(operand), operand.dtype, rows, self.scaling)

    def quantize_weight(
        self, weight_EMK: torch.Tensor, *, forward: bool, backward: bool
    ) -> QuantizedWeight:
        """Quantise a weight for `up` or `down` (forward), for a gradient (backward), or both."""
        weight_EMK = weight_EMK.contiguous()
        out = new_quantized_weight(weight_EMK, self.scaling, forward=forward, backward=backward)
        for launch in quantize_weight_launches(weight_EMK, out, self.scaling):
            launch.run()
        return out

    def quantize_rows(self, rows_MK: torch.Tensor) -> QuantizedRows:
        """Quantise rows along the contraction."""
        out = new_quantized_rows(rows_MK.shape, rows_MK, self.scaling)
        quantize_rows_launch(rows_MK, out, self.scaling).run()
        return out

    def up(
        self, x_TD: torch.Tensor, gate_up_proj: QuantizedWeight, *, hidden: bool, act: bool
    ) -> tuple[torch.Tensor | None, QuantizedRows | None]:
        """Return hidden (T * K, 2F) and act (T * K, F), None for one that is not wanted."""
        x = self.quantize_rows(x_TD)
        tiles = self.tiles("up", x.values)
        assert gate_up_proj.forward is not None
        rows, both = len(self.routing.slot_of_row), gate_up_proj.forward.values.shape[1]
        is_fused = quantizes_act(both // 2, tiles, self.scaling)
        hidden_N2F = x_TD.new_empty(rows, both) if hidden else None
        act_NF = None
        if act and is_fused:
            act_NF = new_quantized_rows((rows, both // 2), x_TD, self.scaling)
        elif act:
            act_NF = x_TD.new_empty(rows, both // 2)
        fp8_up_launch(
            x, gate_up_proj.forward, hidden_N2F, act_NF,
            self.routing.slot_of_row, self.row_tiles.map(tiles.block_m), self.top_k, tiles,
            scaling=self.scaling,
        ).run()  # fmt: skip
        if isinstance(act_NF, torch.Tensor):
            act_NF = self.quantize_rows(act_NF)
        return hidden_N2F, act_NF

    def down(self, act_NF: QuantizedRows, down_proj: QuantizedWeight) -> torch.Tensor:
        """Return act @ down[e].T, (T * K, D)."""
        assert down_proj.forward is not None
        return self._fp8_product("down", act_NF, down_proj.forward)

    def input_gradient(
        self, d_hidden: HiddenGradient, gate_up_proj: QuantizedWeight
    ) -> torch.Tensor:
        """Return d_hidden @ gate_up[e], (T * K, D)."""
        assert gate_up_proj.backward is not None
        return self._fp8_product("input_gradient", d_hidden.quantized, gate_up_proj.backward)

    def activation_gradient(
        self,
        d_out_TD: torch.Tensor,
        down_proj: QuantizedWeight,
        hidden_N2F: torch.Tensor,
        weights_TK: torch.Tensor,
        *,
        act: bool,
        overwrite: bool,
    ) -> tuple[HiddenGradient, torch.Tensor | None, torch.Tensor]:
        """Return d_hidden (T * K, 2F), weight * act (T * K, F) or None, d_weights (T, K).

        With `overwrite` the full d_hidden takes the memory of `hidden_N2F`.
        """
        assert down_proj.backward is not None
        (rows, both), routing = hidden_N2F.shape, self.routing
        d_out = self.quantize_rows(d_out_TD)
        tiles = self.tiles("activation_gradient", d_out.values)
        is_fused = quantizes_d_hidden(both // 2, tiles, self.scaling)
        d_hidden_N2F = hidden_N2F if overwrite else torch.empty_like(hidden_N2F)
        quantized = (
            new_quantized_rows(hidden_N2F.shape, hidden_N2F, self.scaling) if is_fused else None
        )
        scaled_act_NF = hidden_N2F.new_empty(rows, both // 2) if act else None
        partials = num_partials(both // 2, tiles), rows
        partial_PN = weights_TK.new_empty(partials, dtype=torch.float32)
        fp8_activation_gradient_launch(
            d_out, down_proj.backward, hidden_N2F, weights_TK, d_hidden_N2F, quantized,
            scaled_act_NF, partial_PN, routing.slot_of_row, self.row_tiles.map(tiles.block_m),
            tiles, scaling=self.scaling,
        ).run()  # fmt: skip
        d_weights_TK = torch.empty_like(weights_TK)
        routing_gradient_launch(partial_PN, routing.row_of_slot, d_weights_TK).run()
        if quantized is None:
            quantized = self.quantize_rows(d_hidden_N2F)
        return HiddenGradient(d_hidden_N2F, quantized), scaled_act_NF, d_weights_TK

    def gate_up_gradient(
        self, d_hidden: HiddenGradient, x_TD: torch.Tensor, out: torch.Tensor, *, accumulate: bool
    ) -> None:
        """Write d_hidden[e].T @ x[e] to `out` (E, 2F, D), or add it."""
        self.full.gate_up_gradient(d_hidden.full, x_TD, out, accumulate=accumulate)

    def _fp8_product(self, stage: str, rows: QuantizedRows, weight_EMK: Quantized) -> torch.Tensor:
        """Return rows @ W[e].T, (T * K, M)."""
        tiles = self.tiles(stage, rows.values)
        out_NM = rows.values.new_empty(
            (len(rows.values), weight_EMK.values.shape[1]), dtype=rows.dtype
        )
        fp8_product_launch(
            rows, weight_EMK, out_NM, self.row_tiles.map(tiles.block_m), tiles,
            scaling=self.scaling,
        ).run()  # fmt: skip
        return out_NM


class TritonRowwiseFp8Stages(TritonFp8Stages):
    """The same with one scale per row: act and d_hidden are quantised in a pass of their own."""

    scaling = "rowwise"
    warm_up = staticmethod(partial(warm_up, fp8="rowwise"))


class TritonMxFp8Stages(TritonFp8Stages):
    """The same with a power of two for every 32 neighbours along a contraction."""

    scaling = "mxfp8"
    warm_up = staticmethod(partial(warm_up, fp8="mxfp8"))


BY_SCALING = {
    "blockwise": TritonFp8Stages,
    "rowwise": TritonRowwiseFp8Stages,
    "mxfp8": TritonMxFp8Stages,
}

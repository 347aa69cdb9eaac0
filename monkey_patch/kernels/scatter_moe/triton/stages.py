"""The stages on Triton: allocate the result, choose the cut, launch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from monkey_patch.kernels.scatter_moe.routing import Routing, new_routing
from monkey_patch.kernels.scatter_moe.triton.activation_gradient import (
    activation_gradient_launch,
    num_partials,
)
from monkey_patch.kernels.scatter_moe.triton.combine import combine_launch, routing_gradient_launch
from monkey_patch.kernels.scatter_moe.triton.product import product_launch
from monkey_patch.kernels.scatter_moe.triton.routing import sort_launches
from monkey_patch.kernels.scatter_moe.triton.rows import RowTiles
from monkey_patch.kernels.scatter_moe.triton.tiles import (
    Tiles,
    architecture_of,
    choose_tiles,
    takes_tma,
)
from monkey_patch.kernels.scatter_moe.triton.up import up_launch
from monkey_patch.kernels.scatter_moe.triton.warm_up import warm_up
from monkey_patch.kernels.scatter_moe.triton.weight_gradient import weight_gradient_launch


def sort_by_expert(index_TK: torch.Tensor, num_experts: int) -> Routing:
    """Return the routing of `index_TK` without a host synchronisation."""
    index_TK = index_TK.contiguous()
    routing = new_routing(index_TK, num_experts)
    for launch in sort_launches(index_TK, num_experts, routing):
        launch.run()
    return routing


class TritonStages:
    """The stages of one pass over one routing; the interface of `plain.PlainStages`."""

    sort_by_expert = staticmethod(sort_by_expert)
    warm_up = staticmethod(warm_up)

    def __init__(self, routing: Routing, top_k: int):
        self.routing = routing
        self.top_k = top_k
        self.row_tiles = RowTiles(routing)

    def tiles(self, stage: str, operand: torch.Tensor) -> Tiles:
        """Choose the cut of a stage."""
        rows = len(self.routing.slot_of_row) // (len(self.routing.offsets) - 1)
        return choose_tiles(stage, architecture_of(operand), operand.dtype, rows)

    def up(
        self, x_TD: torch.Tensor, gate_up_proj_E2FD: torch.Tensor, *, hidden: bool, act: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return hidden (T * K, 2F) and act (T * K, F), None for one that is not wanted."""
        rows, width = len(self.routing.slot_of_row), gate_up_proj_E2FD.shape[1]
        hidden_N2F = x_TD.new_empty(rows, width) if hidden else None
        act_NF = x_TD.new_empty(rows, width // 2) if act else None
        tiles = self.tiles("up", x_TD)
        up_launch(
            x_TD, gate_up_proj_E2FD, hidden_N2F, act_NF, self.routing.slot_of_row,
            self.row_tiles.map(tiles.block_m), self.top_k, tiles,
        ).run()  # fmt: skip
        return hidden_N2F, act_NF

    def down(self, act_NF: torch.Tensor, down_proj_EDF: torch.Tensor) -> torch.Tensor:
        """Return act @ down[e].T, (T * K, D)."""
        return self._product("down", act_NF, down_proj_EDF, transposed=True)

    def input_gradient(
        self, d_hidden_N2F: torch.Tensor, gate_up_proj_E2FD: torch.Tensor
    ) -> torch.Tensor:
        """Return d_hidden @ gate_up[e], (T * K, D)."""
        return self._product("input_gradient", d_hidden_N2F, gate_up_proj_E2FD, transposed=False)

    def _product(
        self, stage: str, rows_NK: torch.Tensor, weight: torch.Tensor, *, transposed: bool
    ) -> torch.Tensor:
        tiles = self.tiles(stage, rows_NK)
        if tiles.library and takes_tma(rows_NK, weight):  # grouped_mm asks for the same alignment
            weight_EKM = weight.transpose(1, 2) if transposed else weight
            return F.grouped_mm(rows_NK, weight_EKM, offs=self.routing.offsets[1:])
        out_NM = rows_NK.new_empty(len(rows_NK), weight.shape[1 if transposed else 2])
        row_tiles = self.row_tiles.map(tiles.block_m)
        product_launch(rows_NK, weight, out_NM, row_tiles, tiles, transposed=transposed).run()
        return out_NM

    def combine(self, rows_ND: torch.Tensor, weights_TK: torch.Tensor | None) -> torch.Tensor:
        """Return the (weighted) sum of the K rows of every token, (T, D)."""
        out_TD = rows_ND.new_empty(len(rows_ND) // self.top_k, rows_ND.shape[1])
        row_of_slot = self.routing.row_of_slot
        combine_launch(rows_ND, weights_TK, row_of_slot, out_TD, self.top_k).run()
        return out_TD

    def activation_gradient(
        self,
        d_out_TD: torch.Tensor,
        down_proj_EDF: torch.Tensor,
        hidden_N2F: torch.Tensor,
        weights_TK: torch.Tensor,
        *,
        act: bool,
        overwrite: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Return d_hidden (T * K, 2F), weight * act (T * K, F) or None, d_weights (T, K).

        With `overwrite` d_hidden takes the memory of `hidden_N2F`.
        """
        (rows, _), width = hidden_N2F.shape, down_proj_EDF.shape[2]
        tiles = self.tiles("activation_gradient", d_out_TD)
        d_hidden_N2F = hidden_N2F if overwrite else torch.empty_like(hidden_N2F)
        scaled_act_NF = hidden_N2F.new_empty(rows, width) if act else None
        partial_PN = weights_TK.new_empty((num_partials(width, tiles), rows), dtype=torch.float32)
        activation_gradient_launch(
            d_out_TD, down_proj_EDF, hidden_N2F, weights_TK, d_hidden_N2F, scaled_act_NF,
            partial_PN, self.routing.slot_of_row, self.row_tiles.map(tiles.block_m), tiles,
        ).run()  # fmt: skip
        d_weights_TK = torch.empty_like(weights_TK)
        routing_gradient_launch(partial_PN, self.routing.row_of_slot, d_weights_TK).run()
        return d_hidden_N2F, scaled_act_NF, d_weights_TK

    def gate_up_gradient(
        self, d_hidden_N2F: torch.Tensor, x_TD: torch.Tensor, out: torch.Tensor, *, accumulate: bool
    ) -> None:
        """Write d_hidden[e].T @ x[e] to `out` (E, 2F, D), or add it."""
        self._expert_gradient(d_hidden_N2F, x_TD, out, gather_left=False, accumulate=accumulate)

    def down_gradient(
        self,
        d_out_TD: torch.Tensor,
        scaled_act_NF: torch.Tensor,
        out: torch.Tensor,
        *,
        accumulate: bool,
    ) -> None:
        """Write d_out[e].T @ (weight * act)[e] to `out` (E, D, F), or add it."""
        self._expert_gradient(d_out_TD, scaled_act_NF, out, gather_left=True, accumulate=accumulate)

    def _expert_gradient(
        self,
        left: torch.Tensor,
        right: torch.Tensor,
        out: torch.Tensor,
        *,
        gather_left: bool,
        accumulate: bool,
    ) -> None:
        routing, tiles = self.routing, self.tiles("weight_gradient", left)
        weight_gradient_launch(
            left, right, out, routing.slot_of_row, routing.offsets, self.top_k, tiles,
            gather_left=gather_left, accumulate=accumulate,
        ).run()  # fmt: skip

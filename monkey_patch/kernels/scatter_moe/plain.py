"""The stages in plain torch, expert by expert: any dtype and width, where kernels do not run.

The loop reads the offsets back, which costs nothing on a CPU and a synchronisation elsewhere.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F

from monkey_patch.kernels.scatter_moe.routing import Routing


def sort_by_expert(index_TK: torch.Tensor, num_experts: int) -> Routing:
    """Return the routing of `index_TK`."""
    index_N = index_TK.reshape(-1)
    is_routed_N = (index_N >= 0) & (index_N < num_experts)
    expert_N, slot_of_row = torch.where(is_routed_N, index_N, num_experts).sort(stable=True)
    bounds = torch.arange(num_experts + 1, device=index_N.device, dtype=expert_N.dtype)
    row_of_slot = torch.argsort(slot_of_row).masked_fill(~is_routed_N, -1)
    return Routing(
        torch.searchsorted(expert_N, bounds, out_int32=True), slot_of_row.int(), row_of_slot.int()
    )


def silu_and_multiply(hidden_N2F: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up, (N, F), of the two halves of `hidden_N2F`."""
    gate_NF, up_NF = hidden_N2F.chunk(2, dim=-1)
    return F.silu(gate_NF) * up_NF


class CommonStages:
    """What the plain stages share, whatever their operands are."""

    sort_by_expert = staticmethod(sort_by_expert)

    def __init__(self, routing: Routing, top_k: int):
        self.routing = routing
        offsets = routing.offsets.tolist()
        self.bounds = list(pairwise(offsets))
        self.slot = routing.slot_of_row[: offsets[-1]].long()
        self.token = self.slot // top_k
        self.top_k = top_k

    def combine(self, rows_ND: torch.Tensor, weights_TK: torch.Tensor | None) -> torch.Tensor:
        """Return the (weighted) sum of the K rows of every token, (T, D)."""
        row_NS = self.routing.row_of_slot.long()
        wide = torch.promote_types(rows_ND.dtype, torch.float32)
        rows_TKD = rows_ND[row_NS.clamp_min(0)].view(-1, self.top_k, rows_ND.shape[1])
        factor_TK = (row_NS >= 0).view(-1, self.top_k).to(wide)
        if weights_TK is not None:
            factor_TK = factor_TK * weights_TK
        out_T1D = torch.bmm(factor_TK[:, None].to(wide), rows_TKD.to(wide))
        return out_T1D[:, 0].to(rows_ND.dtype)

    def swiglu_gradient(
        self,
        d_act_NF: torch.Tensor,
        hidden_N2F: torch.Tensor,
        weights_TK: torch.Tensor,
        *,
        act: bool,
        overwrite: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Return what `activation_gradient` does, from d_out @ down[e], which is overwritten."""
        wide = torch.promote_types(hidden_N2F.dtype, torch.float32)
        d_act_NF = d_act_NF.to(wide)
        gate_NF, up_NF = hidden_N2F.to(wide).chunk(2, dim=-1)
        sigmoid_NF = torch.sigmoid(gate_NF)
        silu_NF = gate_NF * sigmoid_NF
        act_NF = silu_NF * up_NF
        factor_N1 = act_NF.new_zeros(len(act_NF), 1)
        factor_N1[: len(self.slot), 0] = weights_TK.reshape(-1)[self.slot].to(wide)

        d_weights_N = weights_TK.new_zeros(weights_TK.numel())
        products_N = (d_act_NF * act_NF).sum(dim=-1)[: len(self.slot)]
        d_weights_N[self.slot] = products_N.to(weights_TK.dtype)
        d_act_NF *= factor_N1
        slope_NF = sigmoid_NF + silu_NF * (1 - sigmoid_NF)
        d_gate_NF, d_up_NF = d_act_NF * up_NF * slope_NF, d_act_NF * silu_NF
        d_hidden_N2F = hidden_N2F if overwrite else torch.empty_like(hidden_N2F)
        d_hidden_N2F.copy_(torch.cat([d_gate_NF, d_up_NF], dim=-1))
        scaled_act_NF = (act_NF * factor_N1).to(hidden_N2F.dtype) if act else None
        return d_hidden_N2F, scaled_act_NF, d_weights_N.view_as(weights_TK)

    def down_gradient(
        self,
        d_out_TD: torch.Tensor,
        scaled_act_NF: torch.Tensor,
        out: torch.Tensor,
        *,
        accumulate: bool,
    ) -> None:
        """Write d_out[e].T @ (weight * act)[e] to `out` (E, D, F), or add it."""
        self._expert_gradient(d_out_TD[self.token], scaled_act_NF, out, accumulate)

    def _product(self, rows_NK: torch.Tensor, weight_EKM: torch.Tensor) -> torch.Tensor:
        # Zeros, so that rows of sentinels stay finite through the gate.
        out_NM = rows_NK.new_zeros(len(self.routing.slot_of_row), weight_EKM.shape[2])
        for (start, end), weight_KM in zip(self.bounds, weight_EKM, strict=True):
            torch.mm(rows_NK[start:end], weight_KM, out=out_NM[start:end])
        return out_NM

    def _expert_gradient(
        self, left_NM: torch.Tensor, right_NK: torch.Tensor, out_EMK: torch.Tensor, accumulate: bool
    ) -> None:
        for (start, end), out_MK in zip(self.bounds, out_EMK, strict=True):
            product_MK = left_NM[start:end].T @ right_NK[start:end]
            out_MK.copy_(out_MK + product_MK if accumulate else product_MK)


class PlainStages(CommonStages):
    """The stages of one pass over one routing; the interface of `triton.stages.TritonStages`."""

    def up(
        self, x_TD: torch.Tensor, gate_up_proj_E2FD: torch.Tensor, *, hidden: bool, act: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return hidden (T * K, 2F) and act (T * K, F), None for one that is not wanted."""
        hidden_N2F = self._product(x_TD[self.token], gate_up_proj_E2FD.transpose(1, 2))
        return hidden_N2F if hidden else None, silu_and_multiply(hidden_N2F) if act else None

    def down(self, act_NF: torch.Tensor, down_proj_EDF: torch.Tensor) -> torch.Tensor:
        """Return act @ down[e].T, (T * K, D)."""
        return self._product(act_NF, down_proj_EDF.transpose(1, 2))

    def input_gradient(
        self, d_hidden_N2F: torch.Tensor, gate_up_proj_E2FD: torch.Tensor
    ) -> torch.Tensor:
        """Return d_hidden @ gate_up[e], (T * K, D)."""
        return self._product(d_hidden_N2F, gate_up_proj_E2FD)

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
        d_act_NF = self._product(d_out_TD[self.token], down_proj_EDF)
        return self.swiglu_gradient(d_act_NF, hidden_N2F, weights_TK, act=act, overwrite=overwrite)

    def gate_up_gradient(
        self, d_hidden_N2F: torch.Tensor, x_TD: torch.Tensor, out: torch.Tensor, *, accumulate: bool
    ) -> None:
        """Write d_hidden[e].T @ x[e] to `out` (E, 2F, D), or add it."""
        self._expert_gradient(d_hidden_N2F, x_TD[self.token], out, accumulate)

"""The forward and backward pass of the expert block as a sequence of stages.

    hidden = x W1^T     act = silu(gate) * up     y = act W2^T     out = sum over k of weight * y

    g = d_out W2           d_weight = <g, act>       d_hidden = SwiGLU'(weight * g)
    d_W2 = d_out^T (weight * act)     d_x = sum over k of d_hidden W1     d_W1 = d_hidden^T x

Between the passes live hidden (T * K, 2F), or nothing if it is recomputed, and the routing. A
weight of another dtype than x is cast for one stage at a time; its gradient has its own dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from monkey_patch.kernels.launch import takes_kernels
from monkey_patch.kernels.scatter_moe.plain import PlainStages
from monkey_patch.kernels.scatter_moe.routing import Routing


def expert_forward(
    x_TD: torch.Tensor,
    gate_up_proj_E2FD: torch.Tensor,
    down_proj_EDF: torch.Tensor,
    top_k_index_TK: torch.Tensor,
    top_k_weights_TK: torch.Tensor,
    *,
    keep_hidden: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, Routing]:
    """Return out (T, D), hidden (T * K, 2F) or None, and the routing."""
    num_experts, top_k = len(gate_up_proj_E2FD), top_k_index_TK.shape[1]
    backend = _backend(x_TD)
    if x_TD.is_cuda and takes_kernels(x_TD):
        backend.warm_up(x_TD, down_proj_EDF, top_k, recompute_hidden=not keep_hidden)
    routing = backend.sort_by_expert(top_k_index_TK, num_experts)
    stages = backend(routing, top_k)
    x_TD, dtype = x_TD.contiguous(), x_TD.dtype
    hidden_N2F, act_NF = stages.up(
        x_TD, _operand(gate_up_proj_E2FD, dtype), hidden=keep_hidden, act=True
    )
    y_ND = stages.down(act_NF, _operand(down_proj_EDF, dtype))
    del act_NF
    return stages.combine(y_ND, top_k_weights_TK.contiguous()), hidden_N2F, routing


def expert_backward(
    d_out_TD: torch.Tensor,
    x_TD: torch.Tensor,
    gate_up_proj_E2FD: torch.Tensor,
    down_proj_EDF: torch.Tensor,
    top_k_weights_TK: torch.Tensor,
    hidden_N2F: torch.Tensor | None,
    routing: Routing,
    *,
    needs: Sequence[bool],
    accumulate_into: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
) -> tuple[torch.Tensor | None, ...]:
    """Return the gradients of x, gate_up_proj, down_proj and the routing weights.

    Args:
        d_out_TD: (T, D) gradient of the output.
        x_TD: (T, D) as in the forward pass, like the three that follow.
        gate_up_proj_E2FD: (E, 2F, D).
        down_proj_EDF: (E, D, F).
        top_k_weights_TK: (T, K).
        hidden_N2F: (T * K, 2F) of the forward pass; None computes it again.
        routing: of the forward pass.
        needs: which of the four gradients are wanted; the others are None.
        accumulate_into: gradients of the two weights to add to; the result is None then.
    """
    needs_x, needs_gate_up, needs_down, needs_weights = needs
    dtype, stages = x_TD.dtype, _backend(x_TD)(routing, top_k_weights_TK.shape[1])
    x_TD, d_out_TD = x_TD.contiguous(), d_out_TD.to(dtype).contiguous()
    is_recomputed = hidden_N2F is None
    if is_recomputed:
        hidden_N2F, _ = stages.up(x_TD, _operand(gate_up_proj_E2FD, dtype), hidden=True, act=False)
    d_hidden_N2F, scaled_act_NF, d_weights_TK = stages.activation_gradient(
        d_out_TD, _operand(down_proj_EDF, dtype), hidden_N2F,
        top_k_weights_TK.contiguous(), act=needs_down, overwrite=is_recomputed,
    )  # fmt: skip
    del hidden_N2F
    d_x_TD = d_gate_up = d_down = None
    if needs_down:
        d_down, into = _target(down_proj_EDF, accumulate_into[1])
        stages.down_gradient(d_out_TD, scaled_act_NF, into, accumulate=d_down is None)
        del scaled_act_NF
    if needs_x:
        rows_ND = stages.input_gradient(d_hidden_N2F, _operand(gate_up_proj_E2FD, dtype))
        d_x_TD = stages.combine(rows_ND, None)
        del rows_ND
    if needs_gate_up:
        d_gate_up, into = _target(gate_up_proj_E2FD, accumulate_into[0])
        stages.gate_up_gradient(d_hidden_N2F, x_TD, into, accumulate=d_gate_up is None)
    return d_x_TD, d_gate_up, d_down, d_weights_TK if needs_weights else None


def _operand(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return what a stage multiplies by; where it is a copy, nobody should keep it."""
    return weight.to(dtype).contiguous()


def _target(
    weight: torch.Tensor, existing: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Return the gradient to hand to autograd, if any, and where to write it."""
    if existing is not None:
        return None, existing
    fresh = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    return fresh, fresh


def _backend(x_TD: torch.Tensor) -> Any:
    if not takes_kernels(x_TD):
        return PlainStages
    from monkey_patch.kernels.scatter_moe.triton.stages import TritonStages

    return TritonStages

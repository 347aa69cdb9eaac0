"""The forward and backward pass of the expert block as a sequence of stages.

    hidden = x W1^T     act = silu(gate) * up     y = act W2^T     out = sum over k of weight * y

    g = d_out W2           d_weight = <g, act>       d_hidden = SwiGLU'(weight * g)
    d_W2 = d_out^T (weight * act)     d_x = sum over k of d_hidden W1     d_W1 = d_hidden^T x

Between the passes live hidden (T * K, 2F), or nothing if it is recomputed, and the routing. A
weight of another dtype than x is cast for one stage at a time; its gradient has its own dtype.

In FP8 the stages quantise what they multiply (`plain_fp8.py` says when and what passes between
them): a weight once per pass, from its own dtype. Both weight gradients are computed as without.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from monkey_patch.kernels.fp8_device import require_fp8_products
from monkey_patch.kernels.launch import takes_kernels
from monkey_patch.kernels.scatter_moe.plain import PlainStages
from monkey_patch.kernels.scatter_moe.plain_fp8 import (
    PlainFp8Stages,
    PlainMxFp8Stages,
    PlainRowwiseFp8Stages,
)
from monkey_patch.kernels.scatter_moe.routing import Routing

_PLAIN_FP8 = {
    "blockwise": PlainFp8Stages,
    "rowwise": PlainRowwiseFp8Stages,
    "mxfp8": PlainMxFp8Stages,
}


def expert_forward(
    x_TD: torch.Tensor,
    gate_up_proj_E2FD: torch.Tensor,
    down_proj_EDF: torch.Tensor,
    top_k_index_TK: torch.Tensor,
    top_k_weights_TK: torch.Tensor,
    *,
    keep_hidden: bool,
    fp8: str = "off",
) -> tuple[torch.Tensor, torch.Tensor | None, Routing]:
    """Return out (T, D), hidden (T * K, 2F) or None, and the routing."""
    num_experts, top_k = len(gate_up_proj_E2FD), top_k_index_TK.shape[1]
    backend = _backend(x_TD, fp8)
    if x_TD.is_cuda and takes_kernels(x_TD):
        backend.warm_up(x_TD, down_proj_EDF, top_k, recompute_hidden=not keep_hidden)
    routing = backend.sort_by_expert(top_k_index_TK, num_experts)
    stages = backend(routing, top_k)
    operand = partial(_operand, stages, fp8, x_TD.dtype, forward=True)
    hidden_N2F, act_NF = stages.up(
        x_TD.contiguous(), operand(gate_up_proj_E2FD), hidden=keep_hidden, act=True
    )
    y_ND = stages.down(act_NF, operand(down_proj_EDF))
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
    fp8: str = "off",
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
        fp8: of the forward pass.
    """
    needs_x, needs_gate_up, needs_down, needs_weights = needs
    stages = _backend(x_TD, fp8)(routing, top_k_weights_TK.shape[1])
    operand = partial(_operand, stages, fp8, x_TD.dtype)
    x_TD, d_out_TD = x_TD.contiguous(), d_out_TD.to(x_TD.dtype).contiguous()
    is_recomputed, gate_up = hidden_N2F is None, None
    if is_recomputed:
        gate_up = operand(gate_up_proj_E2FD, forward=True, backward=needs_x)
        hidden_N2F, _ = stages.up(x_TD, gate_up, hidden=True, act=False)
        # What is quantised is worth keeping, at half the bytes; what is cast is not.
        gate_up = None if fp8 == "off" else gate_up
    d_hidden_N2F, scaled_act_NF, d_weights_TK = stages.activation_gradient(
        d_out_TD, operand(down_proj_EDF, backward=True), hidden_N2F,
        top_k_weights_TK.contiguous(), act=needs_down, overwrite=is_recomputed,
    )  # fmt: skip
    del hidden_N2F
    d_x_TD = d_gate_up = d_down = None
    if needs_down:
        d_down, into = _target(down_proj_EDF, accumulate_into[1])
        stages.down_gradient(d_out_TD, scaled_act_NF, into, accumulate=d_down is None)
        del scaled_act_NF
    if needs_x:
        if gate_up is None:
            gate_up = operand(gate_up_proj_E2FD, backward=True)
        rows_ND = stages.input_gradient(d_hidden_N2F, gate_up)
        del gate_up
        d_x_TD = stages.combine(rows_ND, None)
        del rows_ND
    if needs_gate_up:
        d_gate_up, into = _target(gate_up_proj_E2FD, accumulate_into[0])
        stages.gate_up_gradient(d_hidden_N2F, x_TD, into, accumulate=d_gate_up is None)
    return d_x_TD, d_gate_up, d_down, d_weights_TK if needs_weights else None


def _operand(
    stages: Any,
    fp8: str,
    dtype: torch.dtype,
    weight: torch.Tensor,
    *,
    forward: bool = False,
    backward: bool = False,
) -> Any:
    """Return what stages multiply by; where it is a copy, nobody should keep it."""
    if fp8 == "off":
        return weight.to(dtype).contiguous()
    return stages.quantize_weight(weight, forward=forward, backward=backward)


def _target(
    weight: torch.Tensor, existing: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Return the gradient to hand to autograd, if any, and where to write it."""
    if existing is not None:
        return None, existing
    fresh = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    return fresh, fresh


def _backend(x_TD: torch.Tensor, fp8: str) -> Any:
    """Return the class of the stages for a device and a scaling."""
    if fp8 != "off":
        return _fp8_backend(x_TD, fp8)
    if not takes_kernels(x_TD):
        return PlainStages
    from monkey_patch.kernels.scatter_moe.triton.stages import TritonStages

    return TritonStages


def _fp8_backend(x_TD: torch.Tensor, fp8: str) -> Any:
    if x_TD.is_cuda:
        require_fp8_products(
            torch.cuda.get_device_capability(x_TD.device),
            torch.cuda.get_device_name(x_TD.device),
            fp8,
        )
    if not takes_kernels(x_TD):
        return _PLAIN_FP8[fp8]
    from monkey_patch.kernels.scatter_moe.triton.fp8.stages import BY_SCALING

    return BY_SCALING[fp8]

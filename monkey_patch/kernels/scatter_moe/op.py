"""The public mixture-of-experts op: checks, autocast, the custom ops and their autograd.

`monkey_patch::scatter_moe` is one operator, so that torch.compile has nothing to break on and
selective activation checkpointing can name it: a policy that saves its results never runs an expert
product, nor the routing, a second time. Saved for the backward pass are the arguments themselves
(never a view, transpose or cast of a weight, which would keep gathered ZeRO-3 parameters alive),
hidden and the routing: 2 * K * (2F + 4) bytes per token in bf16, or 8 * K with `recompute_hidden`.
In FP8 it is the same operator with an argument, and saves the same: nothing quantised is kept.
"""

from __future__ import annotations

from typing import Any, get_args

import torch

from monkey_patch.kernels.scatter_moe.block import expert_backward, expert_forward
from monkey_patch.kernels.scatter_moe.quantize import Fp8
from monkey_patch.kernels.scatter_moe.routing import Routing


def scatter_moe(
    x_TD: torch.Tensor,
    gate_up_proj_E2FD: torch.Tensor,
    down_proj_EDF: torch.Tensor,
    top_k_index_TK: torch.Tensor,
    top_k_weights_TK: torch.Tensor,
    *,
    recompute_hidden: bool = False,
    accumulate_gradients: bool = False,
    fp8: Fp8 = "off",
) -> torch.Tensor:
    """Route each token through its K experts (SwiGLU) and add the results with their weights.

    Differentiable once in all arguments but the index. Deterministic: stable sort, one writer per
    element, fixed order over K. Products accumulate in float32. On CUDA, and on CPU tensors when
    TRITON_INTERPRET=1, float32, bfloat16 and float16 run on Triton kernels without a host
    synchronisation; everything else in plain torch. float32 products on CUDA follow
    torch.set_float32_matmul_precision.

    Args:
        x_TD: (T, D) hidden states, T >= 0.
        gate_up_proj_E2FD: (E, 2F, D), the dtype of `x_TD`; any dtype under autocast.
        down_proj_EDF: (E, D, F), likewise.
        top_k_index_TK: (T, K) integers; outside [0, E) contributes nothing and gets no gradient.
        top_k_weights_TK: (T, K) routing weights, any float dtype.
        recompute_hidden: compute the (T * K, 2F) result of the first product again in the backward
            pass instead of keeping it; two ninths more work, the same bits.
        accumulate_gradients: add the gradients of the two weights to their `.grad` where they have
            one, inside the kernels. Saves a temporary and a pass, but hooks on these gradients do
            not fire; ignored under torch.compile.
        fp8: scaling of the operands of the four products with a weight, quantised to e4m3
            (`quantize.py`); "off" multiplies in the dtype of `x_TD`. The gradients of the weights
            are products in the dtype of `x_TD` either way. Emulated in float32 on a CPU.

    Returns:
        (T, D) in the dtype of `x_TD`; under autocast computed in the autocast dtype.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together; FP8 of float64, or on a CUDA
            device that has none (below sm_89), mxfp8 below sm_100.
    """
    _check(x_TD, gate_up_proj_E2FD, down_proj_EDF, top_k_index_TK, top_k_weights_TK)
    _check_fp8(fp8, x_TD, gate_up_proj_E2FD, down_proj_EDF)
    device, out_dtype = x_TD.device.type, x_TD.dtype
    if torch.is_autocast_enabled(device):
        x_TD = x_TD.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        out_TD, *_ = _scatter_moe(
            x_TD, gate_up_proj_E2FD, down_proj_EDF, top_k_index_TK, top_k_weights_TK,
            recompute_hidden, accumulate_gradients, fp8,
        )  # fmt: skip
    return out_TD.to(out_dtype)


_Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
_Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@torch.library.custom_op("monkey_patch::scatter_moe", mutates_args=())
def _scatter_moe(
    x: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    recompute_hidden: bool,
    accumulate_gradients: bool,
    fp8: str = "off",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    out, hidden, routing = expert_forward(
        x, gate_up_proj, down_proj, top_k_index, top_k_weights,
        keep_hidden=not recompute_hidden, fp8=fp8,
    )  # fmt: skip
    hidden = x.new_empty(0) if hidden is None else hidden
    return out, hidden, routing.offsets, routing.slot_of_row, routing.row_of_slot


@_scatter_moe.register_fake
def _scatter_moe_shapes(
    x: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    recompute_hidden: bool,
    accumulate_gradients: bool,
    fp8: str = "off",
) -> _Outputs:
    rows, (experts, width, _) = top_k_index.numel(), gate_up_proj.shape
    hidden = x.new_empty(0) if recompute_hidden else x.new_empty(rows, width)
    sizes = (experts + 1, rows, rows)
    offsets, slot_of_row, row_of_slot = (x.new_empty(n, dtype=torch.int32) for n in sizes)
    return x.new_empty(x.shape), hidden, offsets, slot_of_row, row_of_slot


def _save(ctx: Any, inputs: tuple[Any, ...], output: _Outputs) -> None:
    x, gate_up_proj, down_proj, _, weights, _, ctx.accumulate_gradients, ctx.fp8 = inputs
    ctx.save_for_backward(x, gate_up_proj, down_proj, weights, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    # Otherwise autograd makes zeros of hidden's size for a gradient that nobody asked for.
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_out: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
    if d_out is None:
        return (None,) * 8
    x, gate_up, down, weights, hidden, *routing = ctx.saved_tensors
    needs_x, needs_gate_up, needs_down, _, needs_weights = ctx.needs_input_grad[:5]
    needs = [needs_x, needs_gate_up, needs_down, needs_weights]
    existing = _existing(gate_up), _existing(down)
    if ctx.accumulate_gradients and any(grad is not None for grad in existing):
        gradients = expert_backward(
            d_out, x, gate_up, down, weights, hidden if hidden.numel() else None,
            Routing(*routing), needs=needs, accumulate_into=existing, fp8=ctx.fp8,
        )  # fmt: skip
    else:
        found = _scatter_moe_backward(
            d_out, x, gate_up, down, weights, hidden, *routing, needs, ctx.fp8
        )
        gradients = [grad if need else None for grad, need in zip(found, needs, strict=True)]
    d_x, d_gate_up, d_down, d_weights = gradients
    return d_x, d_gate_up, d_down, None, d_weights, None, None, None


def _existing(weight: torch.Tensor) -> torch.Tensor | None:
    """Return the gradient that a kernel may add to."""
    if torch.compiler.is_compiling() or not weight.is_leaf or weight.grad is None:
        return None
    return weight.grad if weight.grad.is_contiguous() else None


_scatter_moe.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("monkey_patch::scatter_moe_backward", mutates_args=())
def _scatter_moe_backward(
    d_out: torch.Tensor,
    x: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    top_k_weights: torch.Tensor,
    hidden: torch.Tensor,
    offsets: torch.Tensor,
    slot_of_row: torch.Tensor,
    row_of_slot: torch.Tensor,
    needs: list[bool],
    fp8: str = "off",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of `expert_backward`; an empty tensor for one that is not needed."""
    gradients = expert_backward(
        d_out, x, gate_up_proj, down_proj, top_k_weights, hidden if hidden.numel() else None,
        Routing(offsets, slot_of_row, row_of_slot), needs=needs, fp8=fp8,
    )  # fmt: skip
    d_x, d_gate_up, d_down, d_weights = (x.new_empty(0) if g is None else g for g in gradients)
    return d_x, d_gate_up, d_down, d_weights


@_scatter_moe_backward.register_fake
def _scatter_moe_backward_shapes(
    d_out: torch.Tensor,
    x: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    top_k_weights: torch.Tensor,
    hidden: torch.Tensor,
    offsets: torch.Tensor,
    slot_of_row: torch.Tensor,
    row_of_slot: torch.Tensor,
    needs: list[bool],
    fp8: str = "off",
) -> _Gradients:
    of = (x, gate_up_proj, down_proj, top_k_weights)
    d_x, d_gate_up, d_down, d_weights = (
        t.new_empty(t.shape) if need else x.new_empty(0) for t, need in zip(of, needs, strict=True)
    )
    return d_x, d_gate_up, d_down, d_weights


def _check(
    x_TD: torch.Tensor,
    gate_up_proj_E2FD: torch.Tensor,
    down_proj_EDF: torch.Tensor,
    top_k_index_TK: torch.Tensor,
    top_k_weights_TK: torch.Tensor,
) -> None:
    num_experts, hidden, intermediate = down_proj_EDF.shape
    if gate_up_proj_E2FD.shape != (num_experts, 2 * intermediate, hidden):
        raise ValueError(
            f"gate_up_proj has shape {tuple(gate_up_proj_E2FD.shape)}, expected (E, 2F, D) = "
            f"{(num_experts, 2 * intermediate, hidden)} for down_proj (E, D, F) = "
            f"{tuple(down_proj_EDF.shape)}"
        )
    if x_TD.ndim != 2 or x_TD.shape[1] != hidden:
        raise ValueError(f"x has shape {tuple(x_TD.shape)}, expected (T, {hidden})")
    if top_k_index_TK.ndim != 2 or top_k_index_TK.shape[0] != x_TD.shape[0]:
        raise ValueError(
            f"top_k_index has shape {tuple(top_k_index_TK.shape)}, expected ({x_TD.shape[0]}, K)"
        )
    if top_k_weights_TK.shape != top_k_index_TK.shape:
        raise ValueError(
            f"top_k_weights has shape {tuple(top_k_weights_TK.shape)}, top_k_index "
            f"{tuple(top_k_index_TK.shape)}; they must agree"
        )
    if top_k_index_TK.is_floating_point() or not top_k_weights_TK.is_floating_point():
        raise ValueError(
            f"top_k_index is {top_k_index_TK.dtype} and top_k_weights {top_k_weights_TK.dtype}; "
            "the first has to be integer, the second floating-point"
        )
    tensors = (x_TD, gate_up_proj_E2FD, down_proj_EDF, top_k_index_TK, top_k_weights_TK)
    if len(devices := {str(t.device) for t in tensors}) > 1:
        raise ValueError(f"the arguments are on {', '.join(sorted(devices))}; move them to one")
    dtypes = {x_TD.dtype, gate_up_proj_E2FD.dtype, down_proj_EDF.dtype}
    if len(dtypes) > 1 and not torch.is_autocast_enabled(x_TD.device.type):
        raise ValueError(
            f"x is {x_TD.dtype} but gate_up_proj {gate_up_proj_E2FD.dtype} and down_proj "
            f"{down_proj_EDF.dtype}; cast them to one dtype or run under torch.autocast"
        )


def _check_fp8(fp8: str, *tensors: torch.Tensor) -> None:
    if fp8 not in get_args(Fp8):
        raise ValueError(f"fp8 is {fp8!r}, expected one of {', '.join(get_args(Fp8))}")
    if fp8 != "off" and any(t.dtype == torch.float64 for t in tensors):
        raise ValueError(
            "fp8 quantises bfloat16, float16 and float32; x, gate_up_proj or down_proj is float64: "
            "cast it or set fp8='off'"
        )

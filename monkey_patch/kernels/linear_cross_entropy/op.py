"""Cross entropy of a linear head in chunks of positions, the gradients in the same pass.

The logits of one chunk exist and become the softmax, then the gradient, in place. Since the loss is
a sum, its gradients with respect to the hidden states and the weight are known in the forward up to
the incoming scalar, so the backward is a multiplication and nothing is recomputed. The weight
itself is not saved: under ZeRO-3 it can be released right after the forward.

On CUDA a kernel makes the gradient out of logits in the dtype of the product, and the weight's
gradient is summed in float32 inside its product, so that neither is ever in memory twice. Both are
ops that write one argument, since torch.compile cannot lower a product into another dtype (PyTorch
issue 163880). Elsewhere it is plain torch, with logits in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from monkey_patch.kernels.launch import takes_kernels
from monkey_patch.kernels.linear_cross_entropy.chunk import tokens_per_chunk


def linear_cross_entropy_sum(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    chunk_tokens: int | None = None,
) -> torch.Tensor:
    """Return the sum of negative log-likelihoods of `targets_N` under `hidden @ weight.T`.

    Softmax and sums are float32 or wider; the weight's gradient is summed over chunks in that
    precision and cast once. Gradients are computed only for inputs that require one. Under autocast
    the products run in the autocast dtype. Two runs give the same bits.

    Args:
        hidden_ND: (N, D) hidden states, N >= 0.
        weight_VD: (V, D) weights, the dtype of `hidden_ND`; any dtype under autocast.
        targets_N: (N,) int64 in [0, V); select labelled rows before the call.
        chunk_tokens: rows whose logits are in memory at the same time; by default as many as
            `chunk.CHUNK_BYTES` holds.

    Returns:
        A scalar, float32 (float64 for float64 inputs), attached to the graph also for N = 0.

    Raises:
        ValueError: shapes or dtypes do not fit together, or `chunk_tokens` is not positive.
    """
    _check(hidden_ND, weight_VD, targets_N, chunk_tokens)
    device = hidden_ND.device.type
    dtype = hidden_ND.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    # Grad mode is always off inside a Function's forward, so it has to be asked for here.
    wants = torch.is_grad_enabled()
    with torch.autocast(device, enabled=False):
        return _LinearCrossEntropySum.apply(
            hidden_ND,
            weight_VD,
            targets_N,
            chunk_tokens,
            dtype,
            wants and hidden_ND.requires_grad,
            wants and weight_VD.requires_grad,
        )


class _LinearCrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        targets_N: torch.Tensor,
        chunk_tokens: int | None,
        dtype: torch.dtype,
        needs_hidden: bool,
        needs_weight: bool,
    ) -> torch.Tensor:
        weight = weight_VD.to(dtype)
        sum_dtype = torch.promote_types(dtype, torch.float32)
        has_kernel, needs_gradient = takes_kernels(weight), needs_hidden or needs_weight
        if chunk_tokens is None:
            logit_bytes = dtype.itemsize if has_kernel else 2 * sum_dtype.itemsize
            chunk_tokens = tokens_per_chunk(len(weight), logit_bytes)
        loss = torch.zeros((), dtype=sum_dtype, device=hidden_ND.device)
        d_hidden_ND = torch.empty_like(hidden_ND) if needs_hidden else None
        make = torch.empty_like if len(hidden_ND) else torch.zeros_like  # the first chunk fills it
        d_weight_VD = make(weight_VD, dtype=sum_dtype) if needs_weight else None
        rows_of = _rows_by_kernel if has_kernel else _rows_in_float32
        for start in range(0, len(hidden_ND), chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            hidden = hidden_ND[rows].to(dtype)
            loss_chunk, d_logits = rows_of(hidden @ weight.T, targets_N[rows], needs_gradient)
            # Out of place: compiled by torch 2.11, a result that was added to gets no gradient.
            loss = loss + loss_chunk
            if d_hidden_ND is not None:
                d_hidden_ND[rows] = d_logits @ weight
            if d_weight_VD is not None:
                _add_product(d_weight_VD, d_logits, hidden, start == 0)
            del d_logits  # before the next chunk's logits exist
        if d_weight_VD is not None:
            d_weight_VD = d_weight_VD.to(weight_VD.dtype)
        ctx.save_for_backward(d_hidden_ND, d_weight_VD)
        return loss

    @staticmethod
    @once_differentiable
    def backward(  # pyrefly: ignore[bad-override]  once_differentiable hides the name ctx
        ctx: Any, *grad_outputs: Any
    ) -> tuple[torch.Tensor | None, ...]:
        (grad_loss,) = grad_outputs
        d_hidden_ND, d_weight_VD = ctx.saved_tensors
        # Out of place: a second backward through a retained graph must see the same gradients.
        return (
            None if d_hidden_ND is None else d_hidden_ND * grad_loss.to(d_hidden_ND.dtype),
            None if d_weight_VD is None else d_weight_VD * grad_loss.to(d_weight_VD.dtype),
            *(None,) * 5,
        )


def _rows_by_kernel(
    logits: torch.Tensor, targets: torch.Tensor, needs_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return one chunk's loss and its gradient by the logits, in the memory of the logits."""
    return _cross_entropy_rows(logits, targets, needs_gradient).sum(), logits


def _rows_in_float32(
    logits: torch.Tensor, targets: torch.Tensor, needs_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the same in plain torch, float32 or wider until the gradient is cast."""
    dtype, sum_dtype = logits.dtype, torch.promote_types(logits.dtype, torch.float32)
    logits = logits.to(sum_dtype)
    log_sum = torch.logsumexp(logits, dim=-1)
    loss = (log_sum - logits.gather(1, targets[:, None])[:, 0]).sum()
    if not needs_gradient:
        return loss, logits
    probs = logits.sub_(log_sum[:, None]).exp_()
    probs.scatter_add_(1, targets[:, None], -torch.ones_like(probs[:, :1]))
    return loss, probs.to(dtype)


@torch.library.custom_op("monkey_patch::cross_entropy_rows", mutates_args=("logits",))
def _cross_entropy_rows(
    logits: torch.Tensor, targets: torch.Tensor, needs_gradient: bool
) -> torch.Tensor:
    """Return the losses of rows; the gradient is written over the logits."""
    from monkey_patch.kernels.linear_cross_entropy.triton.rows import cross_entropy_rows_launch

    losses = _new_losses(logits, targets, needs_gradient)
    cross_entropy_rows_launch(logits, targets, losses, gradient=needs_gradient).run()
    return losses


@_cross_entropy_rows.register_fake
def _new_losses(logits: torch.Tensor, targets: torch.Tensor, needs_gradient: bool) -> torch.Tensor:
    return logits.new_empty(len(logits), dtype=torch.float32)


@torch.library.custom_op("monkey_patch::add_product", mutates_args=("total",))
def _add_product(
    total: torch.Tensor, d_logits: torch.Tensor, hidden: torch.Tensor, is_first: bool
) -> None:
    """Add `d_logits.T @ hidden` to `total`, or put it there, whatever was there, if it is first."""
    if total.dtype == d_logits.dtype:
        torch.addmm(total, d_logits.T, hidden, beta=int(not is_first), out=total)
    elif total.is_cuda:
        _add_wider_product(total, d_logits, hidden, is_first)
    elif is_first:
        total.copy_(d_logits.T @ hidden)
    else:
        total += d_logits.T @ hidden


@_add_product.register_fake
def _add_nothing(
    total: torch.Tensor, d_logits: torch.Tensor, hidden: torch.Tensor, is_first: bool
) -> None:
    pass


def _add_wider_product(
    total: torch.Tensor, d_logits: torch.Tensor, hidden: torch.Tensor, is_first: bool
) -> None:
    """Sum in float32 inside the product of halves: cuBLAS reads and writes `total` once.

    `out_dtype` is for CUDA alone (https://docs.pytorch.org/docs/stable/generated/torch.addmm.html).
    """
    beta = int(not is_first)
    torch.addmm(total, d_logits.T, hidden, out_dtype=total.dtype, beta=beta, out=total)


def _check(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    chunk_tokens: int | None,
) -> None:
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}; set it to 1 or more")
    if hidden_ND.ndim != 2 or hidden_ND.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"hidden has shape {tuple(hidden_ND.shape)}, expected (N, D) with D of the weight "
            f"(V, D) = {tuple(weight_VD.shape)}"
        )
    if targets_N.shape != hidden_ND.shape[:1]:
        raise ValueError(
            f"targets have shape {tuple(targets_N.shape)}, expected ({hidden_ND.shape[0]},)"
        )
    is_mixed = hidden_ND.dtype != weight_VD.dtype
    if is_mixed and not torch.is_autocast_enabled(hidden_ND.device.type):
        raise ValueError(
            f"hidden is {hidden_ND.dtype} but weight {weight_VD.dtype}; cast them to one dtype or "
            f"run under torch.autocast"
        )

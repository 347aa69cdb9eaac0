"""Cross entropy of a linear head in chunks of tokens, the gradients in the same pass.

The logits of one chunk exist in float32 and become the softmax, then the gradient, in place. Since
the loss is a sum, its gradients with respect to the hidden states and the weight are known in the
forward up to the incoming scalar, so the backward is a multiplication and nothing is recomputed.
The weight itself is not saved: under ZeRO-3 it can be released right after the forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

CHUNK_TOKENS = 1024
"""Default chunk: with Qwen3's 151,936 entries the float32 logits of one chunk are 0.58 GiB."""


def linear_cross_entropy_sum(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    chunk_tokens: int = CHUNK_TOKENS,
) -> torch.Tensor:
    """Return the sum of negative log-likelihoods of `targets_N` under `hidden @ weight.T`.

    Softmax and sums are float32 or wider; the weight's gradient is summed over chunks in that
    precision and cast once. Gradients are computed only for inputs that require one. Under autocast
    the products run in the autocast dtype.

    Args:
        hidden_ND: (N, D) hidden states, N >= 0.
        weight_VD: (V, D) weights, the dtype of `hidden_ND`; any dtype under autocast.
        targets_N: (N,) int64 in [0, V); select labelled rows before the call.
        chunk_tokens: rows whose logits are in memory at the same time.

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
        chunk_tokens: int,
        dtype: torch.dtype,
        needs_hidden: bool,
        needs_weight: bool,
    ) -> torch.Tensor:
        weight = weight_VD.to(dtype)
        sum_dtype = torch.promote_types(dtype, torch.float32)
        loss = torch.zeros((), dtype=sum_dtype, device=hidden_ND.device)
        d_hidden_ND = torch.empty_like(hidden_ND) if needs_hidden else None
        d_weight_VD = torch.zeros_like(weight_VD, dtype=sum_dtype) if needs_weight else None
        for start in range(0, len(hidden_ND), chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            hidden = hidden_ND[rows].to(dtype)
            loss_chunk, d_logits = _chunk(hidden, weight, targets_N[rows], sum_dtype)
            loss += loss_chunk
            if d_hidden_ND is not None:
                d_hidden_ND[rows] = d_logits @ weight
            if d_weight_VD is not None:
                d_weight_VD += d_logits.T @ hidden
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


def _chunk(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, sum_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return one chunk's loss and its gradient by the logits, the latter in the weight's dtype."""
    logits = (hidden @ weight.T).to(sum_dtype)
    log_sum = torch.logsumexp(logits, dim=-1)
    loss = (log_sum - logits.gather(1, targets[:, None])[:, 0]).sum()
    probs = logits.sub_(log_sum[:, None]).exp_()
    probs.scatter_add_(1, targets[:, None], -torch.ones_like(probs[:, :1]))
    return loss, probs.to(weight.dtype)


def _check(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor, chunk_tokens: int
) -> None:
    if chunk_tokens < 1:
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

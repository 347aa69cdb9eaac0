"""A top-k router with its load-balancing loss: softmax, choice, statistics, and their gradient.

The loss of one row is E * sum_e f_e P_e with f constant and P a mean of probabilities, so its
gradient by a real token's probabilities is E * f_e / n: the same vector for the whole row. It is
added in the backward pass (the idea of Megatron-LM's auxiliary-loss scaler), which keeps (R, E)
numbers and the token mask, not another (T, E) tensor. Nothing here synchronises with the host.

On CUDA one kernel routes and one computes the gradient, both behind the op `monkey_patch::route`,
which torch.compile takes as one node and selective activation checkpointing can save by name.
Elsewhere it is plain torch, bit for bit what transformers computes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from monkey_patch.kernels.launch import takes_kernels


class Balance(NamedTuple):
    """What the balance loss of one forward needs.

    Attributes:
        mask: (T,) bool, True at real tokens; None takes all.
        num_rows: R, the equally long rows that T tokens consist of; each is balanced on its own.
        scale: 0-dim tensor, the factor of sum_r n_r * sum_e f_re P_re in the total loss.
    """

    mask: torch.Tensor | None
    num_rows: int
    scale: torch.Tensor


class Routed(NamedTuple):
    """What `route` returns.

    Attributes:
        weights: (T, K) in the dtype of the logits, falling within a token.
        index: (T, K) int64 in [0, E), distinct within a token.
        counts: (R, E) int64 as of `routed_counts`; None without a `Balance`.
        sums: (3,) float64 as of `routing_sums`; None without a `Balance`.
    """

    weights: torch.Tensor
    index: torch.Tensor
    counts: torch.Tensor | None
    sums: torch.Tensor | None


def route(
    logits_TE: torch.Tensor, top_k: int, *, renormalize: bool, balance: Balance | None = None
) -> Routed:
    """Choose the K experts with the largest float32 softmax probability of every token.

    Differentiable in the logits through the weights; with a `Balance` the backward of the weights
    adds the gradient of the balance loss. The kernels give ties to the lowest index and route the
    same logits the same way every time; their softmax may differ from torch's in the last bits.

    Args:
        logits_TE: (T, E) of any float dtype and strides, T >= 0; float64 takes plain torch.
        top_k: K in [1, E].
        renormalize: divide the K probabilities by their sum.
        balance: balances and counts; None does neither.

    Raises:
        ValueError: shapes do not fit together.
    """
    _check(logits_TE, top_k, balance)
    if not takes_kernels(logits_TE):
        return _route_plain(logits_TE, top_k, renormalize, balance)
    if balance is None:
        weights_TK, index_TK, _, _ = _route(logits_TE, top_k, renormalize, None, 0, None)
        return Routed(weights_TK, index_TK, None, None)
    weights_TK, index_TK, counts_RE, sums_R3 = _route(logits_TE, top_k, renormalize, *balance)
    return Routed(weights_TK, index_TK, counts_RE, sums_R3.sum(dim=0))


def _check(logits_TE: torch.Tensor, top_k: int, balance: Balance | None) -> None:
    if logits_TE.ndim != 2 or not 1 <= top_k <= logits_TE.shape[1]:
        raise ValueError(
            f"logits have shape {tuple(logits_TE.shape)} and top_k is {top_k}; expected (T, E) "
            "with 1 <= top_k <= E"
        )
    if balance is None:
        return
    num_tokens, (mask_T, num_rows, _) = len(logits_TE), balance
    if num_rows < 1 or num_tokens % num_rows:
        raise ValueError(f"{num_tokens} tokens cannot be {num_rows} equally long rows")
    if mask_T is not None and (mask_T.shape != (num_tokens,) or mask_T.dtype != torch.bool):
        raise ValueError(
            f"mask is {mask_T.dtype} of shape {tuple(mask_T.shape)}, expected bool ({num_tokens},)"
        )


def _route_plain(
    logits_TE: torch.Tensor, top_k: int, renormalize: bool, balance: Balance | None
) -> Routed:
    probs_TE = F.softmax(logits_TE, dtype=torch.float, dim=-1)
    values_TK, index_TK = torch.topk(probs_TE, top_k, dim=-1)
    counts_RE = sums_3 = None
    if balance is not None:
        mask_T, num_rows, scale = balance
        with torch.no_grad():
            counts_RE = routed_counts(index_TK, mask_T, num_rows, logits_TE.shape[1])
            sums_3 = routing_sums(probs_TE, mask_T, counts_RE)
        values_TK = add_balance_gradient(values_TK, probs_TE, counts_RE, mask_T, scale)
    if renormalize:
        values_TK = values_TK / values_TK.sum(dim=-1, keepdim=True)
    return Routed(values_TK.to(logits_TE.dtype), index_TK, counts_RE, sums_3)


@torch.library.custom_op("monkey_patch::route", mutates_args=())
def _route(
    logits: torch.Tensor,
    top_k: int,
    renormalize: bool,
    mask: torch.Tensor | None,
    num_rows: int,
    scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    from monkey_patch.kernels.router.triton import stages

    outputs = _new_outputs(logits, top_k, renormalize, mask, num_rows, scale)
    weights, index, counts, sums_R3 = outputs
    stages.forward(logits, mask, weights, index, counts, sums_R3, renormalize=renormalize)
    return outputs


@_route.register_fake
def _new_outputs(
    logits: torch.Tensor,
    top_k: int,
    renormalize: bool,
    mask: torch.Tensor | None,
    num_rows: int,
    scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    num_tokens, num_experts = logits.shape
    weights = logits.new_empty(num_tokens, top_k)
    index = logits.new_empty((num_tokens, top_k), dtype=torch.int64)
    counts = logits.new_empty((num_rows, num_experts), dtype=torch.int64)
    return weights, index, counts, logits.new_empty((num_rows, 3), dtype=torch.float64)


@torch.library.custom_op("monkey_patch::route_backward", mutates_args=())
def _route_backward(
    d_weights: torch.Tensor,
    logits: torch.Tensor,
    index: torch.Tensor,
    renormalize: bool,
    mask: torch.Tensor | None,
    counts: torch.Tensor,
    scale: torch.Tensor | None,
) -> torch.Tensor:
    from monkey_patch.kernels.router.triton import stages

    rows = None if scale is None else counts
    return stages.backward(d_weights, logits, index, mask, rows, scale, renormalize=renormalize)


@_route_backward.register_fake
def _new_gradient(d_weights: torch.Tensor, logits: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    logits, _, ctx.renormalize, mask, _, scale = inputs
    _, index, counts, sums = output
    ctx.save_for_backward(logits, index, mask, counts, scale)
    ctx.mark_non_differentiable(index, counts, sums)
    # Otherwise autograd makes zeros for the outputs that have no gradient.
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_weights: torch.Tensor | None, *_: Any) -> tuple[Any, ...]:
    if d_weights is None:
        return (None,) * 6
    logits, index, mask, counts, scale = ctx.saved_tensors
    d_logits = _route_backward(d_weights, logits, index, ctx.renormalize, mask, counts, scale)
    return d_logits, *(None,) * 5


_route.register_autograd(_backward, setup_context=_save)


def routed_counts(
    index_TK: torch.Tensor, mask_T: torch.Tensor | None, num_rows: int, num_experts: int
) -> torch.Tensor:
    """Count the (token, k) pairs routed to each expert per row.

    Args:
        index_TK: (T, K) int64 in [0, E).
        mask_T: (T,) bool, True at real tokens; None counts all.
        num_rows: R, the equally long rows that T tokens consist of.
        num_experts: E.

    Returns:
        (R, E) int64.
    """
    index_RN = index_TK.reshape(num_rows, -1)
    ones_TK = torch.ones_like(index_TK) if mask_T is None else mask_T[:, None].expand_as(index_TK)
    counts_RE = index_RN.new_zeros(num_rows, num_experts)
    return counts_RE.scatter_add_(1, index_RN, ones_TK.to(torch.int64).reshape(num_rows, -1))


def routing_sums(
    probs_TE: torch.Tensor, mask_T: torch.Tensor | None, counts_RE: torch.Tensor
) -> torch.Tensor:
    """Return the sums over real tokens that the logged metrics are made of.

    Args:
        probs_TE: (T, E) float32 router probabilities.
        mask_T: (T,) bool, True at real tokens; None takes all.
        counts_RE: (R, E) from `routed_counts`.

    Returns:
        (3,) float64: entropy in nats summed over tokens, balance loss times tokens summed over
        rows, number of tokens.
    """
    num_rows, num_experts = counts_RE.shape
    probs_RTE = probs_TE.view(num_rows, -1, num_experts)
    if mask_T is None:
        mask_RT = probs_RTE.new_ones(probs_RTE.shape[:2])
    else:
        mask_RT = mask_T.view(num_rows, -1).to(probs_TE.dtype)
    prob_sum_RE = torch.bmm(mask_RT[:, None], probs_RTE)[:, 0].double()
    tokens_R = mask_RT.sum(dim=1).double()
    entropy = (torch.special.entr(probs_RTE).sum(dim=-1) * mask_RT).sum().double()
    # n_r * E * sum_e f_e P_e = E * sum_e counts_e * prob_sum_e / n_r
    weighted_R = num_experts * (counts_RE * prob_sum_RE).sum(dim=1) / tokens_R.clamp_min(1)
    return torch.stack([entropy, weighted_R.sum(), tokens_R.sum()])


def add_balance_gradient(
    values_TK: torch.Tensor,
    probs_TE: torch.Tensor,
    counts_RE: torch.Tensor,
    mask_T: torch.Tensor | None,
    scale: torch.Tensor,
) -> torch.Tensor:
    """Return `values_TK` unchanged; its backward also sends the loss gradient to `probs_TE`.

    Args:
        values_TK: (T, K) the probabilities chosen from `probs_TE`.
        probs_TE: (T, E) float32 router probabilities.
        counts_RE: (R, E) from `routed_counts`.
        mask_T: (T,) bool, True at real tokens; None takes all.
        scale: 0-dim tensor, the factor of sum_r n_r * sum_e f_re P_re in the total loss.
    """
    return _AddBalanceGradient.apply(values_TK, probs_TE, counts_RE, mask_T, scale)


class _AddBalanceGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        values_TK: torch.Tensor,
        probs_TE: torch.Tensor,
        counts_RE: torch.Tensor,
        mask_T: torch.Tensor | None,
        scale: torch.Tensor,
    ) -> torch.Tensor:
        num_rows, num_tokens = counts_RE.shape[0], probs_TE.shape[0]
        if mask_T is None:
            tokens_R1 = counts_RE.new_full((num_rows, 1), num_tokens // num_rows)
        else:
            tokens_R1 = mask_T.view(num_rows, -1).sum(dim=1, keepdim=True)
        share_RE = counts_RE.to(probs_TE.dtype) / tokens_R1.clamp_min(1)
        ctx.save_for_backward(share_RE * scale.to(probs_TE.dtype), mask_T)
        ctx.probs_shape = probs_TE.shape
        return values_TK.view_as(values_TK)

    @staticmethod
    @once_differentiable
    def backward(  # pyrefly: ignore[bad-override]  once_differentiable hides the name ctx
        ctx: Any, *grad_outputs: Any
    ) -> tuple[torch.Tensor | None, ...]:
        slope_RE, mask_T = ctx.saved_tensors
        num_tokens, num_experts = ctx.probs_shape
        rows = (len(slope_RE), num_tokens // len(slope_RE), num_experts)
        grad_TE = slope_RE[:, None].expand(rows).reshape(num_tokens, num_experts)
        if mask_T is not None:
            grad_TE = grad_TE * mask_T[:, None]
        return grad_outputs[0], grad_TE, None, None, None

"""Load-balancing statistics of a top-k router and the injection of their gradient.

The loss of one row is E * sum_e f_e P_e with f constant and P a mean of probabilities, so its
gradient by a real token's probabilities is E * f_e / n: the same vector for the whole row. It is
added in the backward of an identity on the top-k values (the idea of Megatron-LM's auxiliary-loss
scaler), which keeps (R, E) numbers and the token mask, not another (T, E) tensor. Nothing here
synchronises with the host.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable


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

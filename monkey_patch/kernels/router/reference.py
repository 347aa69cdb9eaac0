"""The definition of a top-k router and of its load-balancing loss, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def route_reference(
    logits_TE: torch.Tensor, top_k: int, *, renormalize: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return weights (T, K), index (T, K) and probabilities (T, E), all in the logits' dtype.

    Equal probabilities are chosen in the order of their indices.

    Args:
        logits_TE: (T, E) router logits.
        top_k: K.
        renormalize: divide the K probabilities by their sum.
    """
    probs_TE = F.softmax(logits_TE, dim=-1)
    index_TK = probs_TE.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights_TK = probs_TE.gather(1, index_TK)
    if renormalize:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    return weights_TK, index_TK, probs_TE


def balance_loss_reference(
    probs_RTE: torch.Tensor, index_RTK: torch.Tensor, mask_RT: torch.Tensor, num_global_tokens: int
) -> torch.Tensor:
    """Return sum over rows r of (n_r / num_global_tokens) * E * sum_e f_re P_re.

    f_re is the number of row r's real tokens routed to expert e (any of K) divided by n_r, constant
    for the gradient; P_re is the mean of their probabilities. Uniform routing scores K, and all
    tokens on the same K experts with probability one score E. A row without real tokens scores 0.

    Args:
        probs_RTE: (R, T, E) router probabilities of R rows.
        index_RTK: (R, T, K) experts chosen.
        mask_RT: (R, T) bool, True at real tokens.
        num_global_tokens: real tokens of all rows, micro-batches and ranks of the step.
    """
    num_experts = probs_RTE.shape[-1]
    loss = torch.zeros((), dtype=probs_RTE.dtype)
    for probs_TE, index_TK, mask_T in zip(probs_RTE, index_RTK, mask_RT, strict=True):
        if not mask_T.any():
            continue
        real_TE, chosen_TK = probs_TE[mask_T], index_TK[mask_T]
        f_E = F.one_hot(chosen_TK, num_experts).sum(dim=1).to(probs_TE.dtype).mean(dim=0)
        share = len(real_TE) / num_global_tokens
        loss = loss + share * num_experts * (f_E * real_TE.mean(dim=0)).sum()
    return loss

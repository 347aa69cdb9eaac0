"""The definition: cross entropy of a linear head with all logits in memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def linear_cross_entropy_sum_reference(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor
) -> torch.Tensor:
    """Return the sum of the negative log-likelihoods of `targets_N` under `hidden @ weight.T`.

    Args:
        hidden_ND: (N, D) hidden states.
        weight_VD: (V, D) weights of the head.
        targets_N: (N,) integers in [0, V).

    Returns:
        A scalar, float32 or wider.
    """
    logits_NV = F.linear(hidden_ND, weight_VD)
    sum_dtype = torch.promote_types(logits_NV.dtype, torch.float32)
    return F.cross_entropy(logits_NV.to(sum_dtype), targets_N, reduction="sum")

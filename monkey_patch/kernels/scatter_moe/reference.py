"""The definition of the mixture-of-experts feed-forward in plain torch.

Shape letters: T tokens, K experts per token, E experts, D hidden, F expert intermediate; E2FD is
(E, 2F, D) with the gate's rows before the up projection's, as transformers stores it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def scatter_moe_reference(
    x_TD: torch.Tensor,
    gate_up_proj_E2FD: torch.Tensor,
    down_proj_EDF: torch.Tensor,
    top_k_index_TK: torch.Tensor,
    top_k_weights_TK: torch.Tensor,
) -> torch.Tensor:
    """Apply every expert to every token and add the results with their routing weights.

    An expert that a token is not routed to has weight zero there, so an index of E or more
    contributes nothing. Takes E / K times the work of the routed computation; any float dtype.

    Args:
        x_TD: (T, D) hidden states.
        gate_up_proj_E2FD: (E, 2F, D) weights.
        down_proj_EDF: (E, D, F) weights.
        top_k_index_TK: (T, K) integer expert indices.
        top_k_weights_TK: (T, K) routing weights.

    Returns:
        (T, D) in the dtype of `x_TD`, summed over experts in float32 or wider.
    """
    sum_dtype = torch.promote_types(x_TD.dtype, torch.float32)
    out_TD = torch.zeros_like(x_TD, dtype=sum_dtype)
    for expert, (gate_up, down) in enumerate(zip(gate_up_proj_E2FD, down_proj_EDF, strict=True)):
        gate_TF, up_TF = F.linear(x_TD, gate_up).chunk(2, dim=-1)
        expert_out_TD = F.linear(F.silu(gate_TF) * up_TF, down)
        weight_T = (top_k_weights_TK.to(sum_dtype) * (top_k_index_TK == expert)).sum(dim=-1)
        out_TD = out_TD + weight_T[:, None] * expert_out_TD
    return out_TD.to(x_TD.dtype)

"""The definition: causal attention inside each document, by a dense mask over the whole row."""

from __future__ import annotations

import torch


def varlen_attention_reference(
    q_HTC: torch.Tensor,
    k_GTC: torch.Tensor,
    v_GTC: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Attend from each token to itself and the earlier tokens of its document.

    Args:
        q_HTC: (H, T, C) queries.
        k_GTC: (G, T, C) keys; H is a multiple of G.
        v_GTC: (G, T, C) values.
        cu_seq_lens: (S + 1,) int32, 0 and the ends of the documents, the last one T.
        scale: factor of the scores.

    Returns:
        (T, H, C) in the dtype of `q_HTC`.
    """
    num_heads, num_tokens, _ = q_HTC.shape
    token_T = torch.arange(num_tokens, device=q_HTC.device)
    document_T = torch.searchsorted(cu_seq_lens, token_T.to(cu_seq_lens.dtype), right=True)
    is_visible_TT = (document_T[:, None] == document_T) & (token_T[:, None] >= token_T)
    k_HTC = k_GTC.repeat_interleave(num_heads // len(k_GTC), dim=0)
    v_HTC = v_GTC.repeat_interleave(num_heads // len(v_GTC), dim=0)
    scores_HTT = (q_HTC @ k_HTC.transpose(1, 2)) * scale
    probs_HTT = scores_HTT.masked_fill(~is_visible_TT, float("-inf")).softmax(dim=-1)
    return (probs_HTT @ v_HTC).transpose(0, 1)

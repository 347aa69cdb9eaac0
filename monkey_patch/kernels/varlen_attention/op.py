"""Causal attention over packed documents without a (T, T) mask.

On CUDA in bf16 and fp16 torch's own variable-length FlashAttention; elsewhere one
`scaled_dot_product_attention` per document, whose boundaries are read on the host (free on a CPU,
one synchronisation per call for float32 on CUDA). A compiled graph cannot read them: there it is
one call with a mask over the whole row.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F


def varlen_attention(
    q_HTC: torch.Tensor,
    k_GTC: torch.Tensor,
    v_GTC: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    max_length: int,
    scale: float,
) -> torch.Tensor:
    """Attend from each token to itself and the earlier tokens of its document.

    Args:
        q_HTC: (H, T, C) queries.
        k_GTC: (G, T, C) keys; H is a multiple of G.
        v_GTC: (G, T, C) values.
        cu_seq_lens: (S + 1,) int32 on the device, 0 and the ends of the documents, the last one T;
            repeated ends are empty documents.
        max_length: tokens of the longest document, or more.
        scale: factor of the scores.

    Returns:
        (T, H, C) in the dtype of `q_HTC`, in the autocast dtype under autocast.

    Raises:
        ValueError: the documents do not cover the row (checked where boundaries are on the host).
    """
    device = q_HTC.device.type
    if torch.is_autocast_enabled(device):
        # Norms with float32 weights leave queries and keys in float32 beside values in bfloat16.
        dtype = torch.get_autocast_dtype(device)
        q_HTC, k_GTC, v_GTC = (t.to(dtype) for t in (q_HTC, k_GTC, v_GTC))
    if q_HTC.is_cuda and q_HTC.dtype in (torch.bfloat16, torch.float16):
        return _flash(q_HTC, k_GTC, v_GTC, cu_seq_lens, max_length, scale)
    if torch.compiler.is_compiling():
        return _masked(q_HTC, k_GTC, v_GTC, cu_seq_lens, scale)
    return _per_document(q_HTC, k_GTC, v_GTC, cu_seq_lens, scale)


def _per_document(
    q_HTC: torch.Tensor,
    k_GTC: torch.Tensor,
    v_GTC: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    ends = cu_seq_lens.tolist()
    lengths = [end - start for start, end in itertools.pairwise(ends)]
    if ends[0] != 0 or ends[-1] != q_HTC.shape[1] or min(lengths) < 0:
        raise ValueError(
            f"cu_seq_lens runs from {ends[0]} to {ends[-1]}, the row has {q_HTC.shape[1]} tokens; "
            "it has to rise from 0 to the row's length, padding included as a document"
        )
    documents = zip(*(t.split(lengths, dim=1) for t in (q_HTC, k_GTC, v_GTC)), strict=True)
    outputs = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        for q, k, v in (tuple(t[None] for t in document) for document in documents)
        if q.shape[2] > 0
    ]
    return torch.cat(outputs, dim=2)[0].transpose(0, 1) if outputs else q_HTC.transpose(0, 1)


def _masked(
    q_HTC: torch.Tensor,
    k_GTC: torch.Tensor,
    v_GTC: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    token_T = torch.arange(q_HTC.shape[1], device=q_HTC.device, dtype=cu_seq_lens.dtype)
    document_T = torch.searchsorted(cu_seq_lens, token_T, right=True)
    is_visible_TT = (document_T[:, None] == document_T) & (token_T[:, None] >= token_T)
    out_1HTC = F.scaled_dot_product_attention(
        *(t[None] for t in (q_HTC, k_GTC, v_GTC)),
        attn_mask=is_visible_TT,
        scale=scale,
        enable_gqa=True,
    )
    return out_1HTC[0].transpose(0, 1)


def _flash(
    q_HTC: torch.Tensor,
    k_GTC: torch.Tensor,
    v_GTC: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    max_length: int,
    scale: float,
) -> torch.Tensor:
    attend, parameters = _torch_varlen_attn()
    if not takes_groups():
        groups = len(q_HTC) // len(k_GTC)
        k_GTC, v_GTC = (t.repeat_interleave(groups, dim=0) for t in (k_GTC, v_GTC))
    if "scale" not in parameters:
        # Older signatures fix the factor at C ** -0.5, so the rest of it goes into the queries.
        q_HTC = q_HTC * (scale * q_HTC.shape[-1] ** 0.5)
    options = {"scale": scale, "enable_gqa": True, "window_size": (-1, 0), "is_causal": True}
    return attend(
        *(t.transpose(0, 1) for t in (q_HTC, k_GTC, v_GTC)),
        cu_seq_lens,
        cu_seq_lens,
        max_length,
        max_length,
        **{name: value for name, value in options.items() if name in parameters},
    )


def takes_groups() -> bool:
    """Whether torch's kernels take fewer keys and values than queries; else they are repeated."""
    return "enable_gqa" in _torch_varlen_attn()[1]


@functools.cache
def _torch_varlen_attn() -> tuple[Callable[..., Any], frozenset[str]]:
    """Return torch's function and the names it takes: they differ between 2.10, 2.11 and 2.13."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, frozenset(inspect.signature(varlen_attn).parameters)

"""FlashAttention 2, 3 and 4 with the signatures of their packages, computed document by document.

Version 2: `flash_attn_varlen_func` as in flash_attn_interface.py of its repository. Version 3: the
operators of hopper/flash_api.cpp there. Version 4: `flash_attn.cute.interface` of flash-attn-4
4.0.0b36, the wheel. torch registers the last two for CUDA tensors; here that becomes the CPU.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

_FWD = """fwd(Tensor q, Tensor k, Tensor v, Tensor? k_new=None, Tensor? v_new=None,
Tensor? q_v=None, Tensor(a!)? out=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None,
Tensor? cu_seqlens_k_new=None, Tensor? seqused_q=None, Tensor? seqused_k=None,
int? max_seqlen_q=None, int? max_seqlen_k=None, Tensor? page_table=None, Tensor? kv_batch_idx=None,
Tensor? leftpad_k=None, Tensor? rotary_cos=None, Tensor? rotary_sin=None,
Tensor? seqlens_rotary=None, Tensor? q_descale=None, Tensor? k_descale=None,
Tensor? v_descale=None, float? softmax_scale=None, bool is_causal=False, int window_size_left=-1,
int window_size_right=-1, int attention_chunk=0, float softcap=0.0,
bool is_rotary_interleaved=False, Tensor? scheduler_metadata=None, int num_splits=0,
bool? pack_gqa=None, int sm_margin=0) -> (Tensor, Tensor, Tensor, Tensor)"""
_BWD = """bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse,
Tensor(a!)? dq=None, Tensor(b!)? dk=None, Tensor(c!)? dv=None, Tensor? cu_seqlens_q=None,
Tensor? cu_seqlens_k=None, Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None,
int? max_seqlen_k=None, float? softmax_scale=None, bool is_causal=False, int window_size_left=-1,
int window_size_right=-1, float softcap=0.0, bool deterministic=False, int sm_margin=0)
-> (Tensor, Tensor, Tensor, Tensor, Tensor)"""


def _check(
    q: Tensor, k: Tensor, v: Tensor, ends_q: Any, ends_k: Any, longest: int, is_causal: bool
) -> None:
    """Refuse what the kernels refuse, and what is not causal attention to whole documents."""
    assert q.dtype in (torch.bfloat16, torch.float16)
    assert q.dtype == k.dtype == v.dtype
    assert q.ndim == 3
    assert k.shape == v.shape
    assert q.shape[1] % k.shape[1] == 0
    assert all(ends.dtype == torch.int32 and ends.is_contiguous() for ends in (ends_q, ends_k))
    assert torch.equal(ends_q, ends_k)
    assert ends_q[-1] == len(q) == len(k)
    assert longest >= ends_q.diff().max()
    assert is_causal


def _shares(q: Tensor, k: Tensor, ends: Tensor, scale: float | None) -> tuple[Tensor, float]:
    """Return what each query (T, H, C) takes of each key (T, G, C): (H, T, T) float64."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    token = torch.arange(len(q))
    document = torch.searchsorted(ends, token.to(ends.dtype), right=True)
    is_seen = (document[:, None] == document) & (token[:, None] >= token)
    scores = torch.einsum("qhc,khc->hqk", q, k) * scale
    return scores.masked_fill(~is_seen, -torch.inf).softmax(-1), scale


def _wide(q: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Return all in float64, with a head of keys and values for each of the queries'."""
    return [t.double().repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (q, *tensors)]


def _attend(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, scale: float | None) -> Tensor:
    wide_q, wide_k, wide_v = _wide(q, k, v)
    share, _ = _shares(wide_q, wide_k, ends, scale)
    return torch.einsum("hqk,khc->qhc", share, wide_v).to(q.dtype)


def _gradients(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, ends: Tensor, scale: float | None
) -> tuple[Tensor, ...]:
    """Return those of q, k and v, by hand: autograd does not reach inside an operator."""
    wide_q, wide_k, wide_v, wide_d = _wide(q, k, v, d_out)
    share, scale = _shares(wide_q, wide_k, ends, scale)
    d_share = torch.einsum("qhc,khc->hqk", wide_d, wide_v)
    d_score = share * (d_share - (share * d_share).sum(-1, keepdim=True)) * scale
    found = (
        torch.einsum("hqk,khc->qhc", d_score, wide_k),
        torch.einsum("hqk,qhc->khc", d_score, wide_q),
        torch.einsum("hqk,qhc->khc", share, wide_d),
    )
    return tuple(
        d.unflatten(1, (t.shape[1], -1)).sum(2).to(t.dtype)
        for d, t in zip(found, (q, k, v), strict=True)
    )


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False, block_table=None,
):  # fmt: skip
    assert not dropout_p
    assert not softcap
    assert window_size == (-1, -1)
    assert not return_attn_probs
    assert alibi_slopes is None
    assert block_table is None
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, causal)
    return _attend(q, k, v, cu_seqlens_q, softmax_scale)


def _fa3_forward(
    q, k, v, k_new, v_new, q_v, out, ends_q, ends_k, ends_new, used_q, used_k, longest_q, longest_k,
    table, batch, pad, cos, sin, rotary, q_scale, k_scale, v_scale, scale, is_causal, left, right,
    *rest,
):  # fmt: skip
    _check(q, k, v, ends_q, ends_k, longest_q, is_causal)
    lse = q.new_zeros(q.shape[1], len(q), dtype=torch.float32)
    return _attend(q, k, v, ends_q, scale), lse, q.new_empty(0), q.new_empty(0)


def _fa3_backward(
    d_out, q, k, v, out, lse, dq, dk, dv, ends_q, ends_k, used_q, used_k, longest_q, longest_k,
    scale, is_causal, *rest,
):  # fmt: skip
    _check(q, k, v, ends_q, ends_k, longest_q, is_causal)
    for into, gradient in zip((dq, dk, dv), _gradients(d_out, q, k, v, ends_q, scale), strict=True):
        into.copy_(gradient)
    return tuple(q.new_empty(0) for _ in range(5))


def _flash_attn_fwd(
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
    max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None, page_table=None, softmax_scale=None,
    causal=False, softcap=None, window_size_left=None, window_size_right=None,
    learnable_sink=None, tile_mn=None, mma_pv_is_rs=None, intra_wg_overlap=None, num_threads=384,
    num_splits=1, pack_gqa=None, _arch=None, score_mod=None, mask_mod=None,
    block_sparse_tensors=None, return_lse=False, out=None, lse=None, aux_tensors=None,
    aux_scalars=None, q_descale=None, k_descale=None, v_descale=None, gather_kv_indices=None,
    scheduler_metadata=None, seqlen_k_per_split=None, disable_scheduler_metadata=False,
    gather_bwd_recompute_p=False,
):  # fmt: skip
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, causal)
    lse = q.new_zeros(q.shape[1], len(q), dtype=torch.float32)
    return _attend(q, k, v, cu_seqlens_q, softmax_scale), lse, None, None, None


def _flash_attn_bwd(
    q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
    window_size_right=None, m_block_size=64, n_block_size=128, num_threads=256, pack_gqa=False,
    num_stages_Q=2, num_stages_dO=2, SdP_swapAB=False, dKV_swapAB=False, dQ_swapAB=False,
    AtomLayoutMSdP=2, AtomLayoutNdKV=2, AtomLayoutMdQ=2, V_in_regs=False, cu_seqlens_q=None,
    cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None,
    deterministic=False, dq=None, dk=None, dv=None, score_mod=None, score_mod_bwd=None,
    mask_mod=None, aux_tensors=None, aux_scalars=None, block_sparse_tensors=None, dlse=None,
    learnable_sink=None,
):  # fmt: skip
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k, len(q), causal)
    return _gradients(dout, q, k, v, cu_seqlens_q, softmax_scale)


def install(patch: pytest.MonkeyPatch) -> list[torch.library.Library]:
    """Put the packages where imports find them; the operators live as long as what is returned."""
    from torch.nn.attention import _fa3, _fa4

    fa2, cute, fa4 = (
        ModuleType(name) for name in ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface")
    )
    fa2.flash_attn_varlen_func = flash_attn_varlen_func
    fa4._flash_attn_fwd, fa4._flash_attn_bwd = _flash_attn_fwd, _flash_attn_bwd
    for module in (fa2, cute, fa4, ModuleType("flash_attn_interface")):
        patch.setitem(sys.modules, module.__name__, module)
    operators = torch.library.Library("flash_attn_3", "DEF")
    for schema, function in ((_FWD, _fa3_forward), (_BWD, _fa3_backward)):
        operators.define(schema.replace("\n", " "))
        operators.impl(schema.partition("(")[0], function, "CPU")
    for version in (_fa3, _fa4):
        patch.setattr(version, "Library", _OnCpu)
        patch.setattr(version, "_get_device_major", lambda _: torch.cuda.get_device_capability()[0])
    patch.setattr(_fa3, "_fa3_common_support_error", lambda *_, **__: None)
    patch.setattr(_fa4, "_fa4_common_support_error", lambda *_, **__: None)
    return [operators]


class _OnCpu:
    """torch.library.Library, but for CPU tensors."""

    def __init__(self, namespace: str, kind: str, key: str) -> None:
        self._library = torch.library.Library(namespace, kind, "CPU")

    def impl(self, name: str, function: Any, key: str) -> None:
        self._library.impl(name, function, "CPU")

"""The gradient of the logits from that of the weights and from the balance loss."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from monkey_patch.kernels.launch import Launch
from monkey_patch.kernels.router.triton.tile import cut, real_tokens, softmax

# Elements of the (tokens, experts) tile, 8 per thread: 8 tokens of 128 experts. Compiled as in
# `forward` 56 registers and nine programs per multiprocessor; twice the tile takes 109 and four.
_TILE = 1024
_NUM_WARPS = 4


@triton.jit(do_not_specialize=["row_length"])
def _route_bwd_kernel(
    d_weights_ptr,
    logits_ptr,
    index_ptr,
    mask_ptr,
    row_counts_ptr,
    scale_ptr,
    d_logits_ptr,
    row_length,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """d_logits of one block; the softmax is computed again. No division by a weight."""
    blocks = tl.cdiv(row_length, BLOCK_T)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    place_in_row = (tl.program_id(0) % blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
    is_token = place_in_row < row_length
    token = row * row_length + place_in_row
    experts = tl.arange(0, EXPERTS)
    is_expert = experts < NUM_EXPERTS
    probs, _ = softmax(logits_ptr, token, is_token, NUM_EXPERTS, EXPERTS)

    weights = tl.zeros((BLOCK_T, EXPERTS), tl.float32)
    d_weights = tl.zeros((BLOCK_T, EXPERTS), tl.float32)
    for k in range(TOP_K):
        expert = tl.load(index_ptr + token * TOP_K + k, mask=is_token, other=0).to(tl.int32)
        d_weight = tl.load(d_weights_ptr + token * TOP_K + k, mask=is_token, other=0.0)
        is_chosen = experts[None, :] == expert[:, None]
        weights = tl.where(is_chosen, probs, weights)
        d_weights = tl.where(is_chosen, d_weight.to(tl.float32)[:, None], d_weights)
    if RENORMALIZE:
        # Weights that add up to one depend on the chosen logits only, and not on what these have in
        # common. Rounding leaves some of it after the first mean; the second takes that.
        weights /= tl.sum(weights, axis=1)[:, None]
        d_weights -= tl.sum(weights * d_weights, axis=1)[:, None]
        d_logits = weights * (d_weights - tl.sum(weights * d_weights, axis=1)[:, None])
    else:
        d_logits = weights * d_weights - probs * tl.sum(weights * d_weights, axis=1)[:, None]

    if row_counts_ptr is not None:
        counts = tl.load(row_counts_ptr + row * NUM_EXPERTS + experts, mask=is_expert, other=0)
        tokens = tl.maximum(tl.sum(counts, axis=0) // TOP_K, 1).to(tl.float32)
        slope = (counts.to(tl.float32) / tokens * tl.load(scale_ptr).to(tl.float32))[None, :]
        balance = probs * (slope - tl.sum(probs * slope, axis=1)[:, None])
        is_real = real_tokens(mask_ptr, token, is_token)
        d_logits += tl.where(is_real[:, None], balance, 0.0)
    place = d_logits_ptr + token[:, None] * NUM_EXPERTS + experts[None, :]
    d_logits = d_logits.to(d_logits_ptr.dtype.element_ty)
    tl.store(place, d_logits, mask=is_token[:, None] & is_expert[None, :])


def route_backward_launch(
    d_weights_TK: torch.Tensor,
    logits_TE: torch.Tensor,
    index_TK: torch.Tensor,
    mask_T: torch.Tensor | None,
    counts_RE: torch.Tensor | None,
    scale: torch.Tensor | None,
    d_logits_TE: torch.Tensor,
    *,
    renormalize: bool,
) -> Launch:
    """Return the launch that fills `d_logits_TE`.

    Args:
        d_weights_TK: (T, K) contiguous gradient of the weights.
        logits_TE: (T, E) contiguous, of the forward pass, like the four that follow.
        index_TK: (T, K) int64 contiguous.
        mask_T: (T,) bool or None.
        counts_RE: (R, E) int64; None leaves the balance loss out.
        scale: 0-dim, the factor of the balance loss; None together with `counts_RE`.
        d_logits_TE: (T, E) contiguous.
        renormalize: as in the forward pass.
    """
    blocks = cut(logits_TE, 1 if counts_RE is None else len(counts_RE), _TILE)
    return Launch(
        _route_bwd_kernel,
        blocks.num_rows * blocks.blocks_per_row,
        {
            "d_weights_ptr": d_weights_TK,
            "logits_ptr": logits_TE,
            "index_ptr": index_TK,
            "mask_ptr": mask_T,
            "row_counts_ptr": counts_RE,
            "scale_ptr": scale,
            "d_logits_ptr": d_logits_TE,
            "TOP_K": index_TK.shape[1],
            "RENORMALIZE": renormalize,
            **blocks.arguments,
        },
        num_warps=_NUM_WARPS,
    )

"""Add up the K rows of every token, and the partial sums of the routing weights' gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from monkey_patch.kernels.launch import Launch, cdiv, next_power_of_2

_WIDEST = 4096


@triton.jit
def _combine_kernel(
    rows_ptr,
    weights_ptr,
    row_of_slot_ptr,
    out_ptr,
    D: tl.constexpr,
    TOP_K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[t] = sum over k of rows[row of (t, k)], times weights[t, k] if WEIGHTED; k ascending."""
    BLOCKS: tl.constexpr = (D + BLOCK - 1) // BLOCK
    token = (tl.program_id(0) // BLOCKS).to(tl.int64)
    columns = (tl.program_id(0) % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP_K):
        row = tl.load(row_of_slot_ptr + token * TOP_K + k).to(tl.int64)
        mask = (columns < D) & (row >= 0)
        value = tl.load(rows_ptr + row * D + columns, mask=mask, other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weights_ptr + token * TOP_K + k).to(tl.float32)
        total += value
    out = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token * D + columns, out, mask=columns < D)


@triton.jit(do_not_specialize=["num_slots"])
def _routing_gradient_kernel(
    partial_ptr,
    row_of_slot_ptr,
    out_ptr,
    num_slots,
    NUM_PARTIALS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[slot] = sum over p of partial[p, row of slot]; 0 for a slot without a row."""
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(row_of_slot_ptr + slot, mask=slot < num_slots, other=-1).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(NUM_PARTIALS):
        place = partial_ptr + part * num_slots.to(tl.int64) + row
        total += tl.load(place, mask=row >= 0, other=0.0)
    tl.store(out_ptr + slot, total.to(out_ptr.dtype.element_ty), mask=slot < num_slots)


def combine_launch(
    rows_ND: torch.Tensor,
    weights_TK: torch.Tensor | None,
    row_of_slot: torch.Tensor,
    out_TD: torch.Tensor,
    top_k: int,
) -> Launch:
    """Return the launch that fills `out_TD`, accumulating in float32.

    Args:
        rows_ND: (T * K, D) rows sorted by expert.
        weights_TK: (T, K) factors; None adds the rows as they are.
        row_of_slot: of the `Routing`.
        out_TD: (T, D).
        top_k: K.
    """
    num_tokens, width = out_TD.shape
    block = min(_WIDEST, next_power_of_2(width))
    return Launch(
        _combine_kernel,
        num_tokens * cdiv(width, block),
        {
            "rows_ptr": rows_ND,
            "weights_ptr": rows_ND if weights_TK is None else weights_TK,
            "row_of_slot_ptr": row_of_slot,
            "out_ptr": out_TD,
            "D": width,
            "TOP_K": top_k,
            "WEIGHTED": weights_TK is not None,
            "BLOCK": block,
        },
    )


def routing_gradient_launch(
    partial_PN: torch.Tensor, row_of_slot: torch.Tensor, out_TK: torch.Tensor
) -> Launch:
    """Return the launch that fills `out_TK` (T, K) from the partial sums (P, T * K) float32."""
    num_partials, num_slots = partial_PN.shape
    block = 1024
    return Launch(
        _routing_gradient_kernel,
        cdiv(num_slots, block),
        {
            "partial_ptr": partial_PN,
            "row_of_slot_ptr": row_of_slot,
            "out_ptr": out_TK,
            "num_slots": num_slots,
            "NUM_PARTIALS": num_partials,
            "BLOCK": block,
        },
    )

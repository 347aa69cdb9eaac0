"""Adding up the lines that the programs of a forward left."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from monkey_patch.kernels.launch import Launch, next_power_of_2
from monkey_patch.kernels.router.triton.forward import Lines

# Elements of the (lines, experts) tile: 32 lines of 128 experts.
_TILE = 4096


@triton.jit(do_not_specialize=["num_lines"])
def _route_statistics_kernel(
    counts_ptr,
    prob_sums_ptr,
    entropies_ptr,
    row_counts_ptr,
    row_sums_ptr,
    num_lines,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    LINES: tl.constexpr,
):
    """Counts of one row, and its entropy, balance loss times tokens, and tokens, in float64."""
    row, experts = tl.program_id(0).to(tl.int64), tl.arange(0, EXPERTS)
    is_expert = experts < NUM_EXPERTS
    count, prob_sum = tl.zeros((EXPERTS,), tl.int64), tl.zeros((EXPERTS,), tl.float64)
    entropy = tl.zeros((LINES,), tl.float64)
    for first in range(0, num_lines, LINES):
        line_in_row = first + tl.arange(0, LINES)
        is_line, line = line_in_row < num_lines, row * num_lines + line_in_row
        place = line[:, None] * NUM_EXPERTS + experts[None, :]
        mask = is_line[:, None] & is_expert[None, :]
        count += tl.sum(tl.load(counts_ptr + place, mask=mask, other=0), axis=0)
        probs = tl.load(prob_sums_ptr + place, mask=mask, other=0.0)
        prob_sum += tl.sum(probs.to(tl.float64), axis=0)
        entropy += tl.load(entropies_ptr + line, mask=is_line, other=0.0).to(tl.float64)
    tl.store(row_counts_ptr + row * NUM_EXPERTS + experts, count, mask=is_expert)
    # n * E * sum_e f_e P_e = E * sum_e count_e * prob_sum_e / n; each real token counts K times.
    tokens = (tl.sum(count, axis=0) // TOP_K).to(tl.float64)
    product = tl.sum(count.to(tl.float64) * prob_sum, axis=0)
    tl.store(row_sums_ptr + row * 3, tl.sum(entropy, axis=0))
    tl.store(row_sums_ptr + row * 3 + 1, NUM_EXPERTS * product / tl.maximum(tokens, 1.0))
    tl.store(row_sums_ptr + row * 3 + 2, tokens)


def statistics_launch(
    lines: Lines, counts_RE: torch.Tensor, sums_R3: torch.Tensor, top_k: int
) -> Launch:
    """Return the launch that adds up the lines of every row.

    Args:
        lines: filled by `route_launch`.
        counts_RE: (R, E) int64, as of `routed_counts`.
        sums_R3: (R, 3) float64, `routing_sums` of each row.
        top_k: K.
    """
    num_rows, num_experts = counts_RE.shape
    experts = next_power_of_2(num_experts)
    return Launch(
        _route_statistics_kernel,
        num_rows,
        {
            "counts_ptr": lines.counts,
            "prob_sums_ptr": lines.prob_sums,
            "entropies_ptr": lines.entropies,
            "row_counts_ptr": counts_RE,
            "row_sums_ptr": sums_R3,
            "num_lines": len(lines.entropies) // num_rows,
            "NUM_EXPERTS": num_experts,
            "EXPERTS": experts,
            "TOP_K": top_k,
            "LINES": max(1, _TILE // experts),
        },
        num_warps=8,
    )

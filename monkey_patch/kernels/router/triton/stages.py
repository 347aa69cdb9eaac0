"""Forward and backward of the router on Triton: launch in order, fill what the op allocated.

A program takes blocks of tokens of one row and holds their (tokens, experts) tile in registers. Its
sums over tokens are stored plainly, one line per program, and a second kernel adds the lines of a
row in a fixed order: no atomics, no zero-filled buffers, two runs agree bit for bit. How many lines
there are follows from shapes alone. The float32 softmax adds in another order and uses another
exponential than torch's, so the last bits differ; where that makes a tie or breaks one, so may the
choice.
"""

from __future__ import annotations

import torch

from monkey_patch.kernels.router.triton.backward import route_backward_launch
from monkey_patch.kernels.router.triton.forward import new_lines, route_launch
from monkey_patch.kernels.router.triton.statistics import statistics_launch


def forward(
    logits_TE: torch.Tensor,
    mask_T: torch.Tensor | None,
    weights_TK: torch.Tensor,
    index_TK: torch.Tensor,
    counts_RE: torch.Tensor,
    sums_R3: torch.Tensor,
    *,
    renormalize: bool,
) -> None:
    """Fill the last four tensors; without rows no statistics are computed.

    Args:
        logits_TE: (T, E) float32, bfloat16 or float16.
        mask_T: (T,) bool, True at real tokens; None takes all.
        weights_TK: (T, K), any float dtype.
        index_TK: (T, K) int64.
        counts_RE: (R, E) int64, as of `routed_counts`.
        sums_R3: (R, 3) float64, `routing_sums` of each row.
        renormalize: divide the K weights by their sum.
    """
    logits_TE, num_rows = logits_TE.contiguous(), len(counts_RE)
    lines = new_lines(logits_TE, num_rows) if num_rows else None
    route_launch(
        logits_TE, mask_T, num_rows or 1, weights_TK, index_TK, lines, renormalize=renormalize
    ).run()
    if lines is not None:
        statistics_launch(lines, counts_RE, sums_R3, index_TK.shape[1]).run()


def backward(
    d_weights_TK: torch.Tensor,
    logits_TE: torch.Tensor,
    index_TK: torch.Tensor,
    mask_T: torch.Tensor | None,
    counts_RE: torch.Tensor | None,
    scale: torch.Tensor | None,
    *,
    renormalize: bool,
) -> torch.Tensor:
    """Return the gradient of the logits, contiguous.

    Args:
        d_weights_TK: (T, K) gradient of the weights.
        logits_TE: (T, E) of the forward pass, like the four that follow.
        index_TK: (T, K) int64.
        mask_T: (T,) bool or None.
        counts_RE: (R, E) int64; None leaves the balance loss out.
        scale: 0-dim, the factor of the balance loss; None together with `counts_RE`.
        renormalize: as in the forward pass.
    """
    logits_TE, d_weights_TK = logits_TE.contiguous(), d_weights_TK.contiguous()
    d_logits_TE = torch.empty_like(logits_TE)
    route_backward_launch(
        d_weights_TK, logits_TE, index_TK, mask_T, counts_RE, scale, d_logits_TE,
        renormalize=renormalize,
    ).run()  # fmt: skip
    return d_logits_TE

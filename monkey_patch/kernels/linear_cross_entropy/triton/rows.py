"""Cross entropy of rows of logits; their gradient takes the logits' place.

A program owns a row: it reads it once for the maximum and the sum of exponentials (online softmax,
Milakov and Gimelshein, arXiv 1805.02867, one pair per column of the block), and once more to write
softmax minus one-hot over it. Nothing else touches memory, nothing is added across programs, and
two runs agree bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from monkey_patch.kernels.launch import Launch, next_power_of_2

# 16 columns per thread, two loads of 16 bytes in bfloat16. Ahead-of-time compilation says
# (tests/monkey_patch/kernels/test_aot_cross_entropy.py): no spills, four programs or more per SM.
_BLOCK_V = 4096
_NUM_WARPS = 8

READS, WRITES = 2, 1
"""Passes of the kernel over the logits; without the gradient one read and no write."""


@triton.jit
def _cross_entropy_rows_kernel(
    logits_ptr, targets_ptr, losses_ptr, vocab_size, GRADIENT: tl.constexpr, BLOCK_V: tl.constexpr
):
    """The loss, log-sum-exp minus the target's logit; over the logits softmax minus one-hot."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * vocab_size
    offsets = tl.arange(0, BLOCK_V)
    target = tl.load(targets_ptr + row)
    # No address outside the row is read for a target that is not in it.
    is_known = (target >= 0) & (target < vocab_size)
    target_logit = tl.load(row_ptr + target, mask=is_known, other=float("nan")).to(tl.float32)

    # The lowest finite number instead of -inf, whose difference with itself is no number.
    maxima = tl.full((BLOCK_V,), -3.4028234663852886e38, tl.float32)
    sums = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, vocab_size, BLOCK_V):
        columns = start + offsets
        is_column = columns < vocab_size
        logits = tl.load(row_ptr + columns, mask=is_column, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(maxima, logits)
        sums = sums * tl.exp(maxima - higher) + tl.exp(logits - higher)
        maxima = higher
    maximum = tl.max(maxima, axis=0)
    total = tl.sum(sums * tl.exp(maxima - maximum), axis=0)
    tl.store(losses_ptr + row, tl.log(total) + (maximum - target_logit))

    if GRADIENT:
        scale = tl.where(is_known, 1.0 / total, float("nan"))
        for start in range(0, vocab_size, BLOCK_V):
            columns = start + offsets
            is_column = columns < vocab_size
            logits = tl.load(row_ptr + columns, mask=is_column, other=float("-inf")).to(tl.float32)
            probs = tl.exp(logits - maximum) * scale
            probs = tl.where(columns == target, probs - 1.0, probs)
            tl.store(row_ptr + columns, probs.to(logits_ptr.dtype.element_ty), mask=is_column)


def cross_entropy_rows_launch(
    logits_NV: torch.Tensor, targets_N: torch.Tensor, losses_N: torch.Tensor, *, gradient: bool
) -> Launch:
    """Return the launch that fills `losses_N` and puts the gradient in the place of the logits.

    Args:
        logits_NV: (N, V) contiguous, float32, bfloat16 or float16; kept without `gradient`.
        targets_N: (N,) int64; outside [0, V) the row's loss and gradient are NaN.
        losses_N: (N,) float32.
        gradient: whether to write it.
    """
    num_rows, vocab_size = logits_NV.shape
    return Launch(
        _cross_entropy_rows_kernel,
        num_rows,
        {
            "logits_ptr": logits_NV,
            "targets_ptr": targets_N,
            "losses_ptr": losses_N,
            "vocab_size": vocab_size,
            "GRADIENT": gradient,
            "BLOCK_V": min(_BLOCK_V, next_power_of_2(vocab_size)),
        },
        num_warps=_NUM_WARPS,
    )

"""Softmax, choice, renormalisation, and one line of statistics per program."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from monkey_patch.kernels.launch import Launch, cdiv, next_power_of_2
from monkey_patch.kernels.router.triton.tile import Cut, cut, real_tokens, softmax

# Elements of the (tokens, experts) tile, 16 per thread: 32 tokens of 128 experts. The machine code
# for sm_90 (triton 3.7.1, bf16, E = 128, K = 8) has 430 warp instructions per token, with 8 per
# thread 464. 128 registers on sm_90 and sm_100, without a spill, let two programs fit on a
# multiprocessor; float32 logits or 512 experts take around 160, which leaves one.
_TILE = 4096
_NUM_WARPS = 8
# Programs per row, which is two per multiprocessor of a large GPU; longer rows take several blocks
# each, so that the sum over lines stays short.
_MOST_LINES = 256


class Lines(NamedTuple):
    """What the programs of a forward add up, one line each, those of a row one after the other.

    Attributes:
        counts: (P, E) int32, real (token, k) pairs per expert.
        prob_sums: (P, E) float32, probabilities of the real tokens.
        entropies: (P,) float32, of the real tokens.
    """

    counts: torch.Tensor
    prob_sums: torch.Tensor
    entropies: torch.Tensor


@triton.jit
def _choose(probs, EXPERTS: tl.constexpr, TOP_K: tl.constexpr, CHOICES: tl.constexpr):
    """Return the TOP_K largest in falling order, lowest index first, and who was chosen.

    Bit patterns of non-negative floats are ordered like the floats, and NaN is a pattern like any
    other, so a token always gets TOP_K distinct indices. None is a padding column's: those hold 0,
    or NaN where all columns do, and stand behind the experts.
    """
    experts, choices = tl.arange(0, EXPERTS)[None, :], tl.arange(0, CHOICES)[None, :]
    # Without the sign, which NaN may carry; chosen ones become -1, which is below all.
    remaining = probs.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    weights = tl.zeros((probs.shape[0], CHOICES), tl.float32)
    index = tl.zeros((probs.shape[0], CHOICES), tl.int32)
    for k in range(TOP_K):
        # Two integer reductions are fewer instructions than one that carries the index along.
        best = tl.max(remaining, axis=1)
        expert = tl.min(tl.where(remaining == best[:, None], experts, EXPERTS), axis=1)
        remaining = tl.where(experts == expert[:, None], -1, remaining)
        value = best.to(tl.float32, bitcast=True)
        weights = tl.where(choices == k, value[:, None], weights)
        index = tl.where(choices == k, expert[:, None], index)
    return weights, index, remaining < 0


@triton.jit(do_not_specialize=["row_length", "blocks_per_program"])
def _route_fwd_kernel(
    logits_ptr,
    mask_ptr,
    weights_ptr,
    index_ptr,
    counts_ptr,
    prob_sums_ptr,
    entropies_ptr,
    row_length,
    blocks_per_program,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    CHOICES: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Weights and index of consecutive blocks of a row, and the line of their sums."""
    program = tl.program_id(0)
    programs_per_row = tl.cdiv(tl.cdiv(row_length, BLOCK_T), blocks_per_program)
    row = (program // programs_per_row).to(tl.int64)
    first = (program % programs_per_row) * blocks_per_program
    choices = tl.arange(0, CHOICES)[None, :]
    count, prob_sum = tl.zeros((EXPERTS,), tl.int32), tl.zeros((EXPERTS,), tl.float32)
    entropy_sum = tl.zeros((BLOCK_T,), tl.float32)
    for block in range(first, first + blocks_per_program):
        place_in_row = block * BLOCK_T + tl.arange(0, BLOCK_T)
        is_token = place_in_row < row_length
        token = row * row_length + place_in_row
        probs, entropy = softmax(logits_ptr, token, is_token, NUM_EXPERTS, EXPERTS)
        weights, index, is_chosen = _choose(probs, EXPERTS, TOP_K, CHOICES)
        if RENORMALIZE:
            weights /= tl.sum(weights, axis=1)[:, None]
        place = token[:, None] * TOP_K + choices
        is_choice = is_token[:, None] & (choices < TOP_K)
        tl.store(weights_ptr + place, weights.to(weights_ptr.dtype.element_ty), mask=is_choice)
        tl.store(index_ptr + place, index.to(tl.int64), mask=is_choice)
        if counts_ptr is not None:
            is_real = real_tokens(mask_ptr, token, is_token)
            count += tl.sum((is_chosen & is_real[:, None]).to(tl.int32), axis=0)
            prob_sum += tl.sum(tl.where(is_real[:, None], probs, 0.0), axis=0)
            entropy_sum += tl.where(is_real, entropy, 0.0)
    if counts_ptr is not None:
        experts = tl.arange(0, EXPERTS)
        line = program.to(tl.int64) * NUM_EXPERTS + experts
        tl.store(counts_ptr + line, count, mask=experts < NUM_EXPERTS)
        tl.store(prob_sums_ptr + line, prob_sum, mask=experts < NUM_EXPERTS)
        tl.store(entropies_ptr + program, tl.sum(entropy_sum, axis=0))


def new_lines(logits_TE: torch.Tensor, num_rows: int) -> Lines:
    """Return uninitialised lines for the T tokens of `num_rows` rows."""
    num_programs, _ = _programs(cut(logits_TE, num_rows, _TILE))
    size = (num_programs, logits_TE.shape[1])
    return Lines(
        logits_TE.new_empty(size, dtype=torch.int32),
        logits_TE.new_empty(size, dtype=torch.float32),
        logits_TE.new_empty(num_programs, dtype=torch.float32),
    )


def route_launch(
    logits_TE: torch.Tensor,
    mask_T: torch.Tensor | None,
    num_rows: int,
    weights_TK: torch.Tensor,
    index_TK: torch.Tensor,
    lines: Lines | None,
    *,
    renormalize: bool,
) -> Launch:
    """Return the launch that fills `weights_TK`, `index_TK` and `lines`.

    Args:
        logits_TE: (T, E) contiguous, float32, bfloat16 or float16.
        mask_T: (T,) bool, True at real tokens; None takes all.
        num_rows: R, a divisor of T.
        weights_TK: (T, K), any float dtype.
        index_TK: (T, K) int64.
        lines: of `new_lines`; None leaves the statistics out.
        renormalize: divide the K weights by their sum.
    """
    top_k, blocks = index_TK.shape[1], cut(logits_TE, num_rows, _TILE)
    num_programs, blocks_per_program = _programs(blocks)
    counts, prob_sums, entropies = lines or (None, None, None)
    return Launch(
        _route_fwd_kernel,
        num_programs,
        {
            "logits_ptr": logits_TE,
            "mask_ptr": mask_T,
            "weights_ptr": weights_TK,
            "index_ptr": index_TK,
            "counts_ptr": counts,
            "prob_sums_ptr": prob_sums,
            "entropies_ptr": entropies,
            "blocks_per_program": blocks_per_program,
            "TOP_K": top_k,
            "CHOICES": next_power_of_2(top_k),
            "RENORMALIZE": renormalize,
            **blocks.arguments,
        },
        num_warps=_NUM_WARPS,
    )


def _programs(blocks: Cut) -> tuple[int, int]:
    """Return the number of programs and how many blocks each takes."""
    each = max(1, cdiv(blocks.blocks_per_row, _MOST_LINES))
    return blocks.num_rows * cdiv(blocks.blocks_per_row, each), each

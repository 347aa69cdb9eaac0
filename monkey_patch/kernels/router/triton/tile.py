"""What forward and backward share: how tokens are cut into blocks, and the softmax of a block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from monkey_patch.kernels.launch import cdiv, next_power_of_2

_MOST_TOKENS = 128


@dataclass(frozen=True, slots=True)
class Cut:
    """T tokens in R rows, cut into blocks of one row.

    Attributes:
        num_rows: R.
        row_length: tokens of a row.
        num_experts: E.
        block_tokens: tokens of a block.
    """

    num_rows: int
    row_length: int
    num_experts: int
    block_tokens: int

    @property
    def blocks_per_row(self) -> int:
        """Blocks of a row, the last one possibly short."""
        return cdiv(self.row_length, self.block_tokens)

    @property
    def arguments(self) -> dict[str, int]:
        """What every kernel here is told."""
        return {
            "row_length": self.row_length,
            "NUM_EXPERTS": self.num_experts,
            "EXPERTS": next_power_of_2(self.num_experts),
            "BLOCK_T": self.block_tokens,
        }


def cut(logits_TE: torch.Tensor, num_rows: int, tile: int) -> Cut:
    """Return a cut into blocks of about `tile` elements."""
    num_tokens, num_experts = logits_TE.shape
    tokens = max(1, tile // next_power_of_2(num_experts))
    return Cut(num_rows, num_tokens // num_rows, num_experts, min(_MOST_TOKENS, tokens))


@triton.jit
def softmax(logits_ptr, token, is_token, NUM_EXPERTS: tl.constexpr, EXPERTS: tl.constexpr):
    """Return the tokens' probabilities, 0 in padding columns, and their entropies in nats."""
    experts = tl.arange(0, EXPERTS)
    is_expert = (experts < NUM_EXPERTS)[None, :]
    place = logits_ptr + token[:, None] * NUM_EXPERTS + experts[None, :]
    logits = tl.load(place, mask=is_token[:, None] & is_expert, other=0.0).to(tl.float32)
    logits = tl.where(is_expert, logits, float("-inf"))
    logits -= tl.max(logits, axis=1)[:, None]
    exponentials = tl.exp(logits)
    total = tl.sum(exponentials, axis=1)
    probs = exponentials / total[:, None]
    # p log p is 0 at p = 0, where the logit may be -inf.
    mean_logit = tl.sum(probs * tl.where(probs == 0.0, 0.0, logits), axis=1)
    return probs, tl.log(total) - mean_logit


@triton.jit
def real_tokens(mask_ptr, token, is_token):
    """Return which tokens of the block are real."""
    is_real = is_token
    if mask_ptr is not None:
        is_real &= tl.load(mask_ptr + token, mask=is_token, other=0) != 0
    return is_real

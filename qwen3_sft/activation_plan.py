"""Bytes that one token leaves on a GPU between its forward and its backward pass.

Counted from what the operators of this project save, in the letters of docs/design.md, s bytes per
element of the products and r of the residual stream:

    full        D r                                           the layer's input alone
    selective   the same, (H s + 4) of attention for each of H heads x C, D s of its projection,
                D s of the experts and their routing
    none        those of the layer's norms, projections and rotary embedding (Liger's kernels), of
                attention and of the experts with their first product, K 2F s

`full` and `selective` are checked against the bytes that are really alive
(tests/test_activation_plan.py); `none` is counted and not checked, since a CPU runs other norms.
With a policy, one layer at a time is there in full while it is computed again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

Policy = Literal["none", "selective", "full"]

_GIB = 2**30
_INDEX, _WEIGHT, _PERMUTATION = 8, 4, 4  # bytes per routed row


@dataclass(frozen=True)
class ActivationPlan:
    """Bytes by kind.

    Attributes:
        per_token: kept of each token until its backward pass, all layers.
        live_layer: per token, of the layer that is being computed again.
        head: whatever the tokens, of the loss: one chunk of logits and the gradient of lm_head.
    """

    per_token: int
    live_layer: int
    head: int

    def total(self, tokens: int) -> int:
        """Return the bytes of a micro-batch of `tokens`."""
        return tokens * (self.per_token + self.live_layer) + self.head

    def fitting(self, free_bytes: float, row: int) -> int:
        """Return the tokens, in whole rows of `row`, that fit into `free_bytes`."""
        rows = (free_bytes - self.head) / (self.per_token + self.live_layer) // row
        return max(int(rows), 0) * row

    def lines(self, tokens: int) -> Iterator[str]:
        """Yield the lines to print."""
        yield f"activations of {tokens:,} tokens per micro-batch, counted and not measured:"
        rows = {
            f"kept for the backward pass, {self.per_token / 1e6:.2f} MB per token": self.per_token,
            "one layer at a time, computed again": self.live_layer,
        }
        for what, size in rows.items():
            yield f"  {tokens * size / _GIB:10.2f} GiB  {what}"
        yield f"  {self.head / _GIB:10.2f} GiB  a chunk of logits, the gradient of lm_head"


def activation_plan(
    config: Any,
    policy: Policy,
    *,
    compute_bytes: int,
    residual_bytes: int,
    keeps_hidden: bool,
    chunk_tokens: int,
) -> ActivationPlan:
    """Count for a Qwen3-MoE.

    Args:
        config: its text config.
        policy: of activation checkpointing.
        compute_bytes: per element of the products.
        residual_bytes: per element of the residual stream: that of the weights under autocast,
            that of the products where weights are gathered in it.
        keeps_hidden: whether the experts keep their first product (`scatter_moe` does).
        chunk_tokens: positions whose logits exist at once.
    """
    s, r = compute_bytes, residual_bytes
    whole = _layer(config, s, r, keeps_hidden)
    kept = {
        "none": whole,
        "full": config.hidden_size * r,
        "selective": config.hidden_size * (r + 2 * s) + _attention(config, s) + _routing(config),
    }[policy]
    ends = config.hidden_size * (r + s)  # the last norm's input and output
    chunk = chunk_tokens * config.vocab_size * (4 + s)
    return ActivationPlan(
        per_token=kept * config.num_hidden_layers + ends,
        live_layer=0 if policy == "none" else whole,
        head=chunk + config.vocab_size * config.hidden_size * (4 + s),
    )


def _attention(config: Any, s: int) -> int:
    """Bytes per token of attention's output and its log-sum-exp in float32."""
    return config.num_attention_heads * (config.head_dim * s + 4)


def _routing(config: Any) -> int:
    """Bytes per token of the experts' indices and weights and of the two permutations."""
    return config.num_experts_per_tok * (_INDEX + _WEIGHT + 2 * _PERMUTATION)


def _layer(config: Any, s: int, r: int, keeps_hidden: bool) -> int:
    """Bytes per token of one layer without checkpointing."""
    queries = config.num_attention_heads * config.head_dim
    pairs = 2 * config.num_key_value_heads * config.head_dim
    norms = 2 * config.hidden_size * (r + s)  # inputs and outputs of the two
    projections = (queries + pairs) * s  # before their norms
    rotated = (queries + pairs // 2) * s  # after norm and rotary embedding, as attention keeps them
    logits = config.num_experts * s
    first = config.num_experts_per_tok * 2 * config.moe_intermediate_size * s if keeps_hidden else 0
    fixed = _attention(config, s) + _routing(config) + logits
    return norms + projections + rotated + fixed + first

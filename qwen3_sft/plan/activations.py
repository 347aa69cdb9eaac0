"""Bytes that one token leaves on a GPU between its forward and its backward pass.

Counted from what the operators of this project save, in the letters of docs/design.md, s bytes per
element of the products and r of the residual stream:

    full        D r                                           the layer's input alone
    selective   the same, (H s + 4) of attention for each of H heads x C, D s of its projection,
                D s of the experts and their routing
    none        those of the layer's norms, projections and rotary embedding (Liger's kernels), of
                attention and of the experts with their first product, K 2F s

The policies may be mixed, in this order from the first layer to the last. The backward pass comes
from the other end: at its highest point one layer is there in full, computed again or not, and the
experts' backward holds the gradient of their hidden rows and one row of D for each routed token,
K (2F + D) s. That is more than `selective` keeps of five layers.

Checked against every allocation of a step as wide as the 30B model's
(tests/plan/test_peak_memory.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from qwen3_sft.families.flops import head_dim
from qwen3_sft.model.activation_checkpointing import ORDER, Policy

_GIB = 2**30
_INDEX, _PERMUTATION, _FLOAT32 = 8, 4, 4  # bytes


@dataclass(frozen=True)
class Head:
    """Bytes of linear cross entropy on its kernel, beside states and their gradients.

    The gradient of lm_head is summed in float32. Beside it are, one after the other: the logits of
    a chunk, which become their gradient in place, and the product of that with the weight; and the
    sum cast to the weight's dtype. The backward multiplies out of place.

    Attributes:
        least: whatever the tokens.
        total: the sum, and the weight in the dtype of the products.
        per_position: of a chunk.
        chunk_tokens: positions of a chunk, at most.
    """

    least: int
    total: int
    per_position: int
    chunk_tokens: int

    def bytes(self, tokens: int) -> int:
        """Return the most bytes alive with `tokens` labelled positions."""
        return max(self.least, self.total + min(tokens, self.chunk_tokens) * self.per_position)

    def fitting(self, free_bytes: float, per_token: float) -> float:
        """Return the tokens that fit into `free_bytes` where each takes `per_token` beside this."""
        whole_chunks = (free_bytes - self.bytes(self.chunk_tokens)) / per_token
        if whole_chunks >= self.chunk_tokens:
            return whole_chunks
        one_chunk = (free_bytes - self.total) / (per_token + self.per_position)
        return min(one_chunk, (free_bytes - self.least) / per_token, self.chunk_tokens)


@dataclass(frozen=True)
class ActivationPlan:
    """Bytes by kind; those per token of one micro-batch.

    Attributes:
        per_token: kept on the GPU until the backward pass, all layers.
        host_per_token: kept in host memory meanwhile.
        live_layer: of the layer whose backward runs, beyond what is kept, at the highest point.
        backward: working memory of that layer's backward.
        head_per_token: of the loss: the last norm's input and output, labelled states and their
            gradient.
        head: of the loss beside these.
    """

    per_token: int
    host_per_token: int
    live_layer: int
    backward: int
    head_per_token: int
    head: Head

    def total(self, tokens: int) -> int:
        """Return the most bytes alive of a micro-batch of `tokens`.

        The loss and the layers have their turn one after the other.
        """
        layers = tokens * (self.live_layer + self.backward)
        return tokens * self.per_token + max(layers, self.loss(tokens))

    def loss(self, tokens: int) -> int:
        """Return the bytes of the loss of a micro-batch of `tokens`."""
        return tokens * self.head_per_token + self.head.bytes(tokens)

    def fitting(self, free_bytes: float, row: int) -> int:
        """Return the tokens, in whole rows of `row`, that fit into `free_bytes`."""
        in_layers = free_bytes / (self.per_token + self.live_layer + self.backward)
        in_head = self.head.fitting(free_bytes, self.per_token + self.head_per_token)
        return max(int(min(in_layers, in_head) // row), 0) * row

    def lines(self, tokens: int) -> Iterator[str]:
        """Yield the lines to print."""
        yield f"activations of {tokens:,} tokens per micro-batch, counted and not measured:"
        rows = {
            f"kept for the backward pass, {self.per_token / 1e6:.2f} MB per token": self.per_token,
            "one layer at a time, computed again": self.live_layer,
            "working memory of its backward pass": self.backward,
        }
        for what, size in rows.items():
            if size:
                yield f"  {tokens * size / _GIB:10.2f} GiB  {what}"
        loss = self.loss(tokens) / _GIB
        yield f"  {loss:10.2f} GiB  or the loss: a chunk of logits, the gradient of lm_head"
        if self.host_per_token:
            yield f"  {tokens * self.host_per_token / _GIB:10.2f} GiB  kept in host memory"


def activation_plan(
    config: Any,
    layers: Mapping[Policy, int],
    *,
    compute_bytes: int,
    residual_bytes: int,
    keeps_hidden: bool,
    chunk_tokens: int,
    offload: bool = False,
    label_fraction: float = 1.0,
    repeats_groups: bool = False,
) -> ActivationPlan:
    """Count for a Qwen3-MoE.

    Args:
        config: its text config.
        layers: number of layers by policy.
        compute_bytes: per element of the products.
        residual_bytes: per element of the residual stream: that of the weights under autocast,
            that of the products where weights are gathered in it.
        keeps_hidden: whether the experts keep their first product (`scatter_moe` does).
        chunk_tokens: positions whose logits exist at once.
        offload: inputs of layers that compute again are kept in host memory.
        label_fraction: share of the tokens whose loss is computed.
        repeats_groups: whether attention is given a copy of keys and values for each head.

    Raises:
        ValueError: an unknown policy, or counts that do not add up to the layers of the model.
    """
    _check(config, layers)
    s, r = compute_bytes, residual_bytes
    layer = _layer(config, s, r, keeps_hidden) + repeats_groups * _repeated(config, s)
    inputs = config.hidden_size * r
    on_gpu = 0 if offload else inputs
    kept = {
        "none": layer,
        "full": on_gpu,
        "selective": on_gpu + _attention(config, s) + 2 * config.hidden_size * s
        + _routing(config, s),
    }  # fmt: skip
    total = sum(count * kept[policy] for policy, count in layers.items())
    # The backward pass starts with the last layer, when all others still keep what they have.
    last = next(policy for policy in reversed(ORDER) if layers.get(policy))
    labelled = int(2 * config.hidden_size * r * label_fraction)
    return ActivationPlan(
        per_token=total + _shared(config, r),
        host_per_token=inputs * (config.num_hidden_layers - layers.get("none", 0)) * offload,
        live_layer=layer - kept[last],
        backward=_backward(config, s, r),
        head_per_token=2 * inputs + labelled,
        head=_head(config, s, r, chunk_tokens),
    )


def _check(config: Any, layers: Mapping[Policy, int]) -> None:
    if unknown := set(layers) - set(get_args(Policy)):
        raise ValueError(f"unknown policies {sorted(unknown)}; they are {get_args(Policy)}")
    if sum(layers.values()) != config.num_hidden_layers:
        raise ValueError(
            f"{dict(layers)} are {sum(layers.values())} layers, the model has "
            f"{config.num_hidden_layers}"
        )


def _attention(config: Any, s: int) -> int:
    """Bytes per token of attention's output and its log-sum-exp in float32."""
    return config.num_attention_heads * (head_dim(config) * s + _FLOAT32)


def _routing(config: Any, s: int) -> int:
    """Bytes per token of the experts' indices and weights and of the two permutations."""
    return config.num_experts_per_tok * (_INDEX + s + 2 * _PERMUTATION)


def _shared(config: Any, r: int) -> int:
    """Bytes per token of what all layers read: ids, positions, labels, cosines and sines."""
    return 4 * _INDEX + 2 * head_dim(config) * r


def _layer(config: Any, s: int, r: int, keeps_hidden: bool) -> int:
    """Bytes per token of what one layer saves without checkpointing."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    residual = 2 * config.hidden_size * r  # inputs of the two norms
    # Under autocast each product casts its own copy: q, k and v; router and experts.
    norms = (2 if r == s else 5) * config.hidden_size * s
    roots = (2 + heads + groups) * _FLOAT32  # of the mean squares, one per normalised row
    projections = (heads + 2 * groups) * head_dim(config) * s  # before their norms
    rotated = (heads + groups) * head_dim(config) * s  # as attention keeps them
    first = config.num_experts_per_tok * 2 * config.moe_intermediate_size * s if keeps_hidden else 0
    fixed = _attention(config, s) + _routing(config, s) + config.num_experts * s
    return residual + norms + roots + projections + rotated + fixed + first


def _repeated(config: Any, s: int) -> int:
    """Bytes per token of the copies of keys and values beyond one for each group."""
    copies = config.num_attention_heads - config.num_key_value_heads
    return 2 * copies * head_dim(config) * s


def _backward(config: Any, s: int, r: int) -> int:
    """Bytes per token that the backward of one layer allocates at its highest point.

    That is in the experts: the gradient of the residual stream (and its cast), of the hidden rows,
    the rows of the input gradient before they are summed, or before them the activated rows.
    """
    hidden, top_k = config.hidden_size, config.num_experts_per_tok
    incoming = hidden * r + (0 if r == s else hidden * s)
    d_hidden = top_k * 2 * config.moe_intermediate_size * s
    rows = max((top_k + 1) * hidden * s, top_k * config.moe_intermediate_size * s)
    return incoming + d_hidden + rows + top_k * s


def _head(config: Any, s: int, r: int, chunk_tokens: int) -> Head:
    weight = config.vocab_size * config.hidden_size
    total = _FLOAT32 * weight + (0 if r == s else s * weight)
    cast = 0 if r == _FLOAT32 else r * weight
    per_position = s * (config.vocab_size + config.hidden_size)
    return Head(max(total + cast, 2 * r * weight), total, per_position, chunk_tokens)

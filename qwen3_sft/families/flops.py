"""Exact model FLOPs of a packed batch.

Honest MFU needs the work the model itself asks for: matrix products only (2 FLOPs per
multiply-add), the top-k experts a token really visits, attention inside the real documents, and
`lm_head` on the positions whose loss is computed. Recomputation never counts. Pure arithmetic over
a config: no torch, no device.

Causal attention counts half of a document's l x l pairs, l^2 / 2, as Megatron and the literature
do; the diagonal that the exact l * (l + 1) / 2 would add is 1 / l of it. Other projects count
otherwise (`bench/parts/flops_conventions.py`): compare tokens per second, or one convention with
itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from qwen3_sft.errors import FlopsError


class ParameterCount(NamedTuple):
    """Parameters of a model: all of them, and those that one token's forward reads."""

    total: int
    active: int


class _Weights(NamedTuple):
    """Matrix weights by part: numbers of elements in one layer, or in the whole head."""

    moe_layers: int
    dense_layers: int
    attention: int
    router: int
    expert: int
    dense_mlp: int
    lm_head: int


@dataclass(frozen=True)
class ModelFlops:
    """Forward FLOPs of a Qwen3-MoE by part, summed over the layers.

    Attributes:
        attention_projections: q, k, v and o projections, per token.
        router: router logits, per token.
        experts: the gate, up and down products of the `top_k` active experts, per token.
        dense_mlp: the MLP of the layers that have no experts, per token.
        lm_head: logits, per position whose loss is computed.
        scores: QK^T and PV, per (query, key) pair that is not masked.
    """

    attention_projections: int
    router: int
    experts: int
    dense_mlp: int
    lm_head: int
    scores: int

    @classmethod
    def from_config(cls, config: Any) -> ModelFlops:
        """Derive the counts from a `Qwen3MoeConfig` or an object with its attributes.

        Args:
            config: a text config. Of Qwen3-VL-MoE pass `config.text_config`.

        Raises:
            FlopsError: for a composite config, whose other towers this would leave out.
        """
        weights = _weights(config)
        moe, layers = weights.moe_layers, config.num_hidden_layers
        return cls(
            attention_projections=2 * layers * weights.attention,
            router=2 * moe * weights.router,
            experts=2 * moe * config.num_experts_per_tok * weights.expert,
            dense_mlp=2 * weights.dense_layers * weights.dense_mlp,
            lm_head=2 * weights.lm_head,
            scores=2 * 2 * layers * config.num_attention_heads * head_dim(config),
        )

    @property
    def linear_per_token(self) -> int:
        """Forward FLOPs per token of every matrix product but `lm_head` and the scores."""
        return self.attention_projections + self.router + self.experts + self.dense_mlp


def train_flops(
    model_flops: ModelFlops,
    *,
    tokens: int,
    label_tokens: int,
    sum_length_squared: int,
    trainable: Literal["full", "lora"] = "full",
) -> float:
    """Count the FLOPs of forward and backward over a packed batch, without recomputation.

    The backward of a matrix product is two more, one for each operand. Under LoRA the weights are
    frozen, so their linear layers need one only; the scores have no weights and keep both. The
    adapters' own products, 0.7% at rank 16 on the attention of Qwen3-30B-A3B, are left out.

    Args:
        model_flops: the counts of the model.
        tokens: tokens that are not padding.
        label_tokens: positions whose loss is computed, at most `tokens`.
        sum_length_squared: sum of the squared document lengths; documents that share a packed row
            do not see each other, so this is far below the square of the row.
        trainable: `full` when all weights get a gradient, `lora` when only adapters do.

    Raises:
        FlopsError: for counts that contradict each other, or an unknown `trainable`.
    """
    if trainable not in ("full", "lora"):
        raise FlopsError(f"trainable={trainable!r} is unknown; use 'full' or 'lora'")
    if not 0 <= label_tokens <= tokens <= sum_length_squared:
        raise FlopsError(
            f"tokens={tokens}, label_tokens={label_tokens}, sum_length_squared="
            f"{sum_length_squared}: expected 0 <= label_tokens <= tokens <= sum_length_squared; "
            "count tokens without padding, and documents as attention separates them"
        )
    linear = model_flops.linear_per_token * tokens + model_flops.lm_head * label_tokens
    causal_scores = model_flops.scores * sum_length_squared / 2
    return (3 if trainable == "full" else 2) * linear + 3 * causal_scores


def num_parameters(config: Any) -> ParameterCount:
    """Count all parameters of a Qwen3-MoE, and the active ones: the same with top-k experts.

    Args:
        config: a text config, as for `ModelFlops.from_config`.

    Raises:
        FlopsError: for a composite config.
    """
    weights = _weights(config)
    embeddings = weights.lm_head * (1 if config.tie_word_embeddings else 2)
    rest = (
        config.num_hidden_layers * (weights.attention + _vectors_per_layer(config))
        + weights.moe_layers * weights.router
        + weights.dense_layers * weights.dense_mlp
        + config.hidden_size
        + embeddings
    )
    experts = weights.moe_layers * weights.expert
    return ParameterCount(
        total=rest + experts * config.num_experts,
        active=rest + experts * config.num_experts_per_tok,
    )


def _weights(config: Any) -> _Weights:
    if getattr(config, "text_config", None) is not None:
        raise FlopsError(
            f"{type(config).__name__} holds several towers and only the text one is counted here; "
            "pass config.text_config and add the vision tower's FLOPs yourself"
        )
    hidden, width = config.hidden_size, head_dim(config)
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads  # q and o, k and v
    moe = sum(_has_experts(config, layer) for layer in range(config.num_hidden_layers))
    return _Weights(
        moe_layers=moe,
        dense_layers=config.num_hidden_layers - moe,
        attention=hidden * width * heads,
        router=hidden * config.num_experts,
        expert=3 * hidden * config.moe_intermediate_size,
        dense_mlp=3 * hidden * config.intermediate_size,
        lm_head=hidden * config.vocab_size,
    )


def _has_experts(config: Any, layer: int) -> bool:
    # The condition of Qwen3MoeDecoderLayer.__init__ in transformers 5.23.
    return (
        layer not in (config.mlp_only_layers or ())
        and config.num_experts > 0
        and (layer + 1) % config.decoder_sparse_step == 0
    )


def _vectors_per_layer(config: Any) -> int:
    """Weights of the four norms, and the projection biases where the config has them."""
    width, hidden = head_dim(config), config.hidden_size
    biases = hidden + width * (config.num_attention_heads + 2 * config.num_key_value_heads)
    return 2 * hidden + 2 * width + (biases if config.attention_bias else 0)


def head_dim(config: Any) -> int:
    """Return the width of a head; transformers' configs have it only where config.json sets it."""
    given = getattr(config, "head_dim", None)
    return given or config.hidden_size // config.num_attention_heads

"""How long an optimizer step should take on one GPU, part by part, before it runs.

Products take their FLOPs (families/flops.py) over a rate that such products reach, the other
kernels their bytes over a bandwidth. An expert product is rounded up to whole tiles of rows and
takes at least the time to read the experts' weights, which is what decides below 4,096 tokens.
Nothing here was measured in this project: the rates are published or assumed, and each row of them
says which. A comparison with a run tells which part is slower than it could be.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from qwen3_sft.families.family import family_of
from qwen3_sft.families.flops import head_dim
from qwen3_sft.hardware import find_device
from qwen3_sft.model.activation_checkpointing import Policy

Level = Literal["good", "target", "limit"]

# Bytes that norms, rotary embedding, activation and sums move per token and layer of the 30B with
# fused kernels (assumed), and the bytes of a layer's widths in bfloat16 that they grow with.
_FORWARD_PASSES, _BACKWARD_PASSES = 95e3, 215e3
_WIDTH_30B = 60_416
_LOSS_PASSES = 2e6  # bytes per labelled position: softmax and gradient of a row of logits, assumed

# The backward of attention recomputes the scores: five products instead of two.
_ATTENTION_BACKWARD = 2.5


@dataclass(frozen=True)
class Efficiency:
    """Rates of one family of devices.

    Attributes:
        experts: TFLOP/s of grouped products, forward and backward.
        dense: TFLOP/s of other products, forward and backward.
        attention: TFLOP/s, forward and backward.
        bandwidth: of the memory, TB/s.
        passes: factor on the traffic of the other kernels.
        overhead: share added to everything but the optimizer: launches, gaps.
        tile: rows that an expert's rows are rounded up to.
        nvlink: bytes per second between GPUs.
        source: of the numbers.
    """

    experts: tuple[float, float]
    dense: tuple[float, float]
    attention: tuple[float, float]
    bandwidth: float
    passes: float
    overhead: float
    tile: int
    nvlink: float
    source: str


_ASSUMED = "products assumed from 788 TFLOP/s of one of 8192^3 in bf16 on an H200; attention from "
_CHART = "FlashAttention 3's H100 chart (648 and 561; cuDNN 595-617 and 516)"
_BYTES = "; memory from a copy at 4.3 TB/s on an H200; NVLink 450 GB/s, 370 assumed"
_SOURCE = _ASSUMED + _CHART + _BYTES
_ON_H100 = "; bandwidth scaled by the data sheets' 3.35 / 4.8 TB/s"

_H200: dict[Level, Efficiency] = {
    "good": Efficiency(
        (550, 450), (650, 620), (520, 400), 3.6, 1.2, 0.05, 128, 370e9, _SOURCE
    ),
    "target": Efficiency(
        (600, 500), (680, 650), (600, 450), 3.8, 1.0, 0.03, 128, 370e9, _SOURCE
    ),
    "limit": Efficiency(
        (788, 788), (788, 788), (648, 561), 4.3, 1.0, 0.0, 1, 450e9, _SOURCE
    ),
}  # fmt: skip
_B200 = "all assumed, from data sheets and the same shares as on Hopper"

EFFICIENCIES: dict[str, dict[Level, Efficiency]] = {
    "H200 SXM": _H200,
    "H100 SXM": {
        level: replace(
            _H200[level],
            bandwidth=_H200[level].bandwidth * 3.35 / 4.8,
            source=_SOURCE + _ON_H100,
        )
        for level in _H200
    },
    "B200": {
        "good": Efficiency(
            (1350, 1100), (1500, 1400), (1200, 850), 6.5, 1.1, 0.04, 128, 740e9, _B200
        ),
        "limit": Efficiency(
            (1750, 1750), (1750, 1750), (1500, 1200), 7.2, 1.0, 0.0, 1, 900e9, _B200
        ),
    },
}  # fmt: skip


@dataclass(frozen=True)
class StepTime:
    """Expected time of one optimizer step on each GPU.

    Attributes:
        parts: seconds by part; `communication` is what computation does not hide.
        tokens: of one GPU in the step.
        source: of the rates.
    """

    parts: dict[str, float]
    tokens: int
    source: str

    @property
    def step_s(self) -> float:
        """Seconds of the step."""
        return sum(self.parts.values())

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second and GPU."""
        return self.tokens / self.step_s


def efficiency(device: str, level: Level = "good") -> Efficiency | None:
    """Return the rates of a device, by its short or driver name; None where there are none."""
    spec = find_device(device)
    return None if spec is None else EFFICIENCIES.get(spec.name, {}).get(level)


def step_time(
    config: Any,
    device: str,
    *,
    tokens: int,
    mean_length: float,
    layers: Mapping[Policy, int],
    keeps_hidden: bool,
    optimizer_bytes: float,
    accumulation: int = 1,
    label_fraction: float = 1.0,
    shards: int = 1,
    reduced_bytes: int = 4,
    cast_bytes: int = 0,
    level: Level = "good",
) -> StepTime | None:
    """Return the expected time of a step in bfloat16, None for a device without rates.

    Args:
        config: text config of a Qwen3-MoE.
        device: short or driver name.
        tokens: of a micro-batch on one GPU, without padding.
        mean_length: of the documents, weighted by length: sum(l^2) / sum(l).
        layers: number of layers by policy of activation checkpointing.
        keeps_hidden: whether the experts keep their first product (`scatter_moe` does).
        optimizer_bytes: moved per parameter by an update (`optimizer_memory.moved_bytes`).
        accumulation: micro-batches in a step.
        label_fraction: share of the tokens whose loss is computed.
        shards: GPUs that share one copy of the weights, each gathering them as FSDP does.
        reduced_bytes: per element of the gradients on their way.
        cast_bytes: moved per micro-batch by casts of the experts' weights.
        level: `good` for rates that good kernels reach, `target` for this project's goals, `limit`
            for the best known.
    """
    rates = efficiency(device, level)
    if rates is None:
        return None
    count = _Times(config, rates, tokens, mean_length)
    forward, backward = count.forward(), count.backward()
    recompute = count.recompute(forward, layers, keeps_hidden=keeps_hidden)
    head = label_fraction * count.head()
    parameters = family_of(config).count_parameters(config).total
    parts = {name: forward[name] + backward[name] for name in forward}
    parts |= {"lm_head": head, "recompute": recompute}
    per_token = {name: seconds * (1 + rates.overhead) for name, seconds in parts.items()}
    scale = tokens * (1 + rates.overhead)
    hidden = (sum(forward.values()) * scale, (sum(backward.values()) + recompute + head) * scale)
    seconds = {name: value * tokens * accumulation for name, value in per_token.items()}
    seconds["optimizer"] = optimizer_bytes * parameters / shards / (rates.bandwidth * 1e12)
    seconds["casts"] = cast_bytes * accumulation / (rates.bandwidth * 1e12)
    exposed = _exposed(parameters, shards, reduced_bytes, rates.nvlink, hidden)
    seconds["communication"] = exposed * accumulation
    return StepTime(seconds, tokens * accumulation, rates.source)


def _exposed(
    parameters: int, shards: int, reduced_bytes: int, nvlink: float, hidden: tuple[float, float]
) -> float:
    """Seconds per micro-batch of gathering and reducing that computation does not hide.

    Args:
        parameters: of the model.
        shards: GPUs that share them.
        reduced_bytes: per element of the gradients on their way.
        nvlink: bytes per second.
        hidden: seconds of computation in forward and backward pass.
    """
    share = (shards - 1) / shards
    gather, reduce = (parameters * size * share / nvlink for size in (2, reduced_bytes))
    forward, backward = hidden
    return max(gather - forward, 0.0) + max(gather + reduce - backward, 0.0)


class _Times:
    """Seconds per token."""

    def __init__(self, config: Any, rates: Efficiency, tokens: int, mean_length: float) -> None:
        self.config, self.rates, self.tokens = config, rates, tokens
        self.flops = family_of(config).count_flops(config)
        self.scores = self.flops.scores * mean_length / 2
        self.dense = self.flops.attention_projections + self.flops.router + self.flops.dense_mlp
        heads = 2 * config.num_attention_heads + 3 * config.num_key_value_heads
        width = 8 * config.hidden_size + 2 * heads * head_dim(config) + 2 * self._routed_width()
        self.passes = config.num_hidden_layers * rates.passes * width / _WIDTH_30B
        self.bandwidth = rates.bandwidth * 1e12

    def _routed_width(self) -> int:
        return self.config.num_experts_per_tok * 2 * self.config.moe_intermediate_size

    def forward(self) -> dict[str, float]:
        rates = self.rates
        return {
            "dense": self.dense / (rates.dense[0] * 1e12),
            "experts": self._experts(self.flops.experts, rates.experts[0]),
            "attention": self.scores / (rates.attention[0] * 1e12),
            "memory_passes": self.passes * _FORWARD_PASSES / self.bandwidth,
        }

    def backward(self) -> dict[str, float]:
        rates = self.rates
        return {
            "dense": 2 * self.dense / (rates.dense[1] * 1e12),
            "experts": self._experts(2 * self.flops.experts, rates.experts[1]),
            "attention": _ATTENTION_BACKWARD * self.scores / (rates.attention[1] * 1e12),
            "memory_passes": self.passes * _BACKWARD_PASSES / self.bandwidth,
        }

    def head(self) -> float:
        """Of a labelled position; forward and backward run at one rate, in one pass."""
        return 3 * self.flops.lm_head / (self.rates.dense[0] * 1e12) + _LOSS_PASSES / self.bandwidth

    def recompute(
        self, forward: Mapping[str, float], layers: Mapping[Policy, int], *, keeps_hidden: bool
    ) -> float:
        """Of what runs again in the backward pass.

        `full` runs a layer again, `selective` its norms, q, k and v projections and the router's;
        experts that keep no first product run that again, two thirds of them, in any layer.
        """
        count = sum(layers.values())
        full, selective = (layers.get(policy, 0) / count for policy in ("full", "selective"))
        heads, groups = self.config.num_attention_heads, self.config.num_key_value_heads
        projected = self.flops.attention_projections * (heads + 2 * groups) / (heads + groups) / 2
        again = (projected + self.flops.router) / self.dense
        first_product = 0 if keeps_hidden else forward["experts"] * 2 / 3
        return (
            full * sum(forward.values())
            + selective * (forward["dense"] * again + forward["memory_passes"] / 2)
            + first_product
        )

    def _experts(self, flops: float, tflops: float) -> float:
        """Of the experts' products: bound by their FLOPs in whole tiles, or by their bytes."""
        config, layers = self.config, self.config.num_hidden_layers
        rows = self.tokens * config.num_experts_per_tok / config.num_experts
        tiles = 1 + self.rates.tile / 2 / rows
        weights = 2 * config.num_experts * 3 * config.hidden_size * config.moe_intermediate_size
        moved = config.num_experts_per_tok * config.hidden_size + 2 * self._routed_width()
        traffic = layers * (weights / self.tokens + moved)
        return max(
            flops * tiles / (tflops * 1e12), traffic / self.bandwidth * flops / self.flops.experts
        )

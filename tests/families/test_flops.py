from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3MoeConfig, Qwen3VLMoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeForCausalLM

from qwen3_sft.demo.model import tiny_config, tiny_model
from qwen3_sft.errors import FlopsError
from qwen3_sft.families.flops import ModelFlops, num_parameters, train_flops

H100_BF16 = 989e12
VARIANTS = {
    "all_moe": {},
    "dense_first_layer": {"mlp_only_layers": [0]},
    "sparse_step_2": {"decoder_sparse_step": 2, "num_hidden_layers": 3},
    "top_3_of_5": {"num_experts": 5, "num_experts_per_tok": 3},
    "no_gqa": {"num_key_value_heads": 4, "head_dim": 24},
    "tied_and_biased": {"tie_word_embeddings": True, "attention_bias": True},
}


def small_config(**overrides) -> Qwen3MoeConfig:
    sizes = {"hidden_size": 64, "moe_intermediate_size": 48, "num_hidden_layers": 2}
    config = tiny_config(512, **{**sizes, "num_experts": 8, "head_dim": 16, **overrides})
    # Eager attention and experts are mm and bmm, which the counter knows. It has no formula for
    # the CPU's flash attention nor for grouped_mm: it counts both as nothing.
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    return config


@pytest.fixture(scope="module")
def qwen3_30b() -> Qwen3MoeConfig:
    return tiny_config(
        151936,
        hidden_size=2048,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
    )


def honest_per_token(config: Qwen3MoeConfig, length: int) -> float:
    """Honest FLOPs per token of equally long documents, every position labelled."""
    total = train_flops(
        ModelFlops.from_config(config),
        tokens=length,
        label_tokens=length,
        sum_length_squared=length**2,
    )
    return total / length


def counted(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def counted_by_part(model, **inputs) -> Counter[str]:
    """Forward FLOPs that torch's counter sees, by the module they belong to."""
    with FlopCounterMode(display=False) as counter:
        model(**inputs)
    flops = {
        name.removeprefix("Qwen3MoeForCausalLM."): sum(ops.values())
        for name, ops in counter.get_flop_counts().items()
    }
    parts: Counter[str] = Counter()
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            parts["attention" if "self_attn" in name else "dense_mlp"] += flops.get(name, 0)
        elif name.endswith(("mlp.gate", "mlp.experts", "lm_head")):
            parts[name.rsplit(".")[-1]] += flops.get(name, 0)
        elif name.endswith("self_attn"):
            inner = sum(flops.get(f"{name}.{child}", 0) for child, _ in module.named_children())
            parts["scores"] += flops[name] - inner
    assert sum(parts.values()) == counter.get_total_flops()
    return parts


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_part_of_the_forward_equals_torchs_counter(variant):
    config = small_config(**VARIANTS[variant])
    flops = ModelFlops.from_config(config)
    rows, length, labels = 2, 24, 5
    parts = counted_by_part(
        tiny_model(config), input_ids=torch.randint(0, 512, (rows, length)), logits_to_keep=labels
    )
    tokens = rows * length
    assert parts["attention"] == flops.attention_projections * tokens
    assert parts["gate"] == flops.router * tokens
    assert parts["experts"] == flops.experts * tokens
    assert parts["dense_mlp"] == flops.dense_mlp * tokens
    assert parts["lm_head"] == flops.lm_head * rows * labels
    # Eager attention also multiplies the masked half, so it runs all l^2 pairs.
    assert parts["scores"] == flops.scores * rows * length**2


@pytest.mark.parametrize("labels", [32, 5])
def test_full_training_equals_torchs_counter(labels):
    config, length = small_config(), 32
    model = tiny_model(config)
    ids = torch.randint(0, 512, (1, length))
    flops = ModelFlops.from_config(config)
    exact = train_flops(flops, tokens=length, label_tokens=labels, sum_length_squared=length**2)
    masked_half = 3 * flops.scores * length**2 / 2
    run = counted(lambda: model(input_ids=ids, logits_to_keep=labels).logits.sum().backward())
    assert run == exact + masked_half


def test_lora_training_equals_torchs_counter_on_frozen_weights():
    config, length = small_config(), 32
    model = tiny_model(config).requires_grad_(False)
    embeddings = torch.randn(1, length, config.hidden_size, requires_grad=True)
    ids = torch.randint(0, 512, (1, length))
    flops = ModelFlops.from_config(config)
    batch = {"tokens": length, "label_tokens": length, "sum_length_squared": length**2}
    exact = train_flops(flops, **batch, trainable="lora")
    masked_half = 3 * flops.scores * length**2 / 2
    run = counted(lambda: model(inputs_embeds=embeddings, labels=ids).loss.backward())
    assert run == exact + masked_half
    assert exact < train_flops(flops, **batch)


def test_documents_of_a_pack_count_like_separate_rows():
    flops = ModelFlops.from_config(small_config())
    lengths = [7, 1, 40, 16]
    separate = sum(
        train_flops(flops, tokens=n, label_tokens=n // 2, sum_length_squared=n * n) for n in lengths
    )
    packed = train_flops(
        flops,
        tokens=sum(lengths),
        label_tokens=sum(n // 2 for n in lengths),
        sum_length_squared=sum(n * n for n in lengths),
    )
    assert packed == separate


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameter_count_equals_the_real_model(variant):
    config = small_config(**VARIANTS[variant])
    model = tiny_model(config)
    total = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    idle = experts * (config.num_experts - config.num_experts_per_tok) // config.num_experts
    assert num_parameters(config) == (total, total - idle)


def test_parameter_count_of_qwen3_30b_a3b(qwen3_30b):
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(qwen3_30b)
    total, active = num_parameters(qwen3_30b)
    assert total == sum(p.numel() for p in model.parameters()) == 30_532_122_624
    assert active == 3_041_867_776 + 151_936 * 2048


def test_forward_of_qwen3_30b_a3b_by_part(qwen3_30b):
    flops = ModelFlops.from_config(qwen3_30b)
    billions = [
        round(part / 1e9, 3)
        for part in (flops.attention_projections, flops.router, flops.experts, flops.lm_head)
    ]
    assert billions == [1.812, 0.025, 3.624, 0.622]
    assert flops.dense_mlp == 0
    assert flops.scores / 2 == 2 * 48 * 32 * 128


# Section 1 of the performance notes: GFLOP per token, forward and backward.
@pytest.mark.parametrize(
    ("length", "honest"),
    [(2048, 20.67), (4096, 23.08), (8192, 27.91), (12288, 32.75), (32768, 56.90), (131072, 172.9)],
)
def test_gflop_per_token_of_qwen3_30b_a3b(qwen3_30b, length, honest):
    rounding = 0.05 if length == 131072 else 0.005
    assert honest_per_token(qwen3_30b, length) / 1e9 == pytest.approx(honest, abs=rounding)


@pytest.mark.parametrize(
    ("tokens_per_second", "length", "tflops", "mfu"),
    [(6260, 12288, 205.0, 0.207), (12040, 4096, 277.9, 0.281), (13011.4, 4096, 300.3, 0.304)],
)
def test_honest_figures_of_published_runs(qwen3_30b, tokens_per_second, length, tflops, mfu):
    per_second = tokens_per_second * honest_per_token(qwen3_30b, length)
    assert per_second / 1e12 == pytest.approx(tflops, abs=0.05)
    assert per_second / H100_BF16 == pytest.approx(mfu, abs=5e-4)


def test_vision_language_models_are_counted_by_their_text_config():
    config = Qwen3VLMoeConfig(text_config=dict.fromkeys(["num_hidden_layers"], 3))
    assert ModelFlops.from_config(config.text_config).lm_head > 0
    with pytest.raises(FlopsError, match=r"Qwen3VLMoeConfig.*pass config\.text_config"):
        ModelFlops.from_config(config)


@pytest.mark.parametrize(
    "counts", [(10, 11, 100), (10, -1, 100), (10, 5, 9)], ids=["labels", "negative", "lengths"]
)
def test_contradicting_counts_are_refused(counts):
    tokens, label_tokens, squares = counts
    with pytest.raises(FlopsError, match=f"tokens=10, label_tokens={label_tokens}"):
        train_flops(
            ModelFlops.from_config(small_config()),
            tokens=tokens,
            label_tokens=label_tokens,
            sum_length_squared=squares,
        )


def test_unknown_trainable_is_refused():
    typo: Any = "qlora"
    with pytest.raises(FlopsError, match="trainable='qlora' is unknown; use 'full' or 'lora'"):
        train_flops(
            ModelFlops.from_config(small_config()),
            tokens=1,
            label_tokens=1,
            sum_length_squared=1,
            trainable=typo,
        )

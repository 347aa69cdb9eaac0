"""What a token leaves behind, by hand for the 30B and against real forward passes."""

from __future__ import annotations

import json

import pytest
from transformers import Qwen3MoeConfig

from qwen3_sft.families.known_models import KNOWN_CONFIGS
from qwen3_sft.model.meta_model import known_config
from qwen3_sft.plan.activations import activation_plan

BF16 = {"compute_bytes": 2, "residual_bytes": 2, "chunk_tokens": 4096}
SHARED = 32 + 512  # ids, positions, labels; cosines and sines

# Bytes per token and layer of the 30B in bfloat16, counted by hand.
INPUT = 4096
ATTENTION = 8192 + 128
ROUTING = 8 * (8 + 2 + 4 + 4)
FIRST = 24576
LAYER = (
    4 * 4096  # inputs and outputs of the two norms
    + 4 * (2 + 32 + 4)  # roots of mean squares
    + 10240  # q, k and v
    + 9216  # q and k after norm and rotary embedding
    + ATTENTION
    + ROUTING
    + 256  # the router's logits
)


@pytest.fixture
def config():
    return Qwen3MoeConfig(**KNOWN_CONFIGS["Qwen/Qwen3-30B-A3B"])


def test_published_sizes_of_the_30b(config):
    full = activation_plan(config, {"full": 48}, keeps_hidden=True, **BF16)
    selective = activation_plan(config, {"selective": 48}, keeps_hidden=False, **BF16)
    none = activation_plan(config, {"none": 48}, keeps_hidden=True, **BF16)
    kept = INPUT + ATTENTION + 2 * 4096 + ROUTING
    assert full.per_token == 48 * INPUT + SHARED
    assert selective.per_token == 48 * kept + SHARED
    assert none.per_token == 48 * (LAYER + FIRST) + SHARED
    assert none.live_layer == 0
    assert full.live_layer == LAYER + FIRST - INPUT
    assert selective.live_layer == LAYER - kept
    # Gradients of the residual stream, of the hidden rows, of the routing weights; rows, their sum.
    backward = 4096 + FIRST + 8 * 2 + 8 * 4096 + 4096
    assert {p.backward for p in (full, selective, none)} == {backward}
    # lm_head's gradient in float32; a chunk's logits and gradient of its states, or the cast.
    weight, position = 151936 * 2048, 2 * (151936 + 2048)
    assert full.head.bytes(16384) == full.head.bytes(4096) == 4 * weight + 4096 * position
    assert full.head.bytes(3000) == 4 * weight + 3000 * position
    assert full.head.bytes(16) == 6 * weight
    assert full.head_per_token == 4 * 4096


def test_what_is_alive_is_what_is_counted():
    """The bytes that a policy adds per token, of a real forward pass in float32."""
    from tests.model.test_activation_checkpointing import LAYERS, LENGTH, make_model, step

    model = make_model()
    sizes = {"compute_bytes": 4, "residual_bytes": 4, "keeps_hidden": False, "chunk_tokens": 8}
    planned = {
        p: activation_plan(model.config, {p: LAYERS}, **sizes).per_token
        for p in ("full", "selective")
    }
    kept = {p: step(model, p)[4] / LENGTH for p in planned}
    assert kept["selective"] - kept["full"] == pytest.approx(
        planned["selective"] - planned["full"], rel=0.05
    )
    deeper = make_model(num_hidden_layers=2 * LAYERS)
    per_layer = (step(deeper, "full")[4] / LENGTH - kept["full"]) / LAYERS
    assert per_layer == pytest.approx(model.config.hidden_size * 4, rel=0.05)


def test_policies_mix(config):
    def plan(**layers):
        return activation_plan(config, layers, keeps_hidden=False, **BF16)

    mixed, full, none = plan(full=20, selective=16, none=12), plan(full=48), plan(none=48)
    selective = plan(selective=48)
    parts = 20 * full.per_token + 16 * selective.per_token + 12 * none.per_token
    assert mixed.per_token == parts // 48
    # The last layer keeps all it has, so nothing is added when its backward runs first.
    assert mixed.live_layer == plan(selective=47, none=1).live_layer == 0
    assert plan(full=47, selective=1).live_layer == selective.live_layer
    totals = [plan(selective=n, none=48 - n).total(16384) for n in (0, 12, 36, 48)]
    assert totals == sorted(totals, reverse=True)


def test_inputs_in_host_memory(config):
    sizes = {"keeps_hidden": False, **BF16}
    here = activation_plan(config, {"selective": 36, "none": 12}, **sizes)
    away = activation_plan(config, {"selective": 36, "none": 12}, offload=True, **sizes)
    assert here.host_per_token == 0
    assert away.host_per_token == 36 * INPUT == here.per_token - away.per_token
    assert any("host" in line for line in away.lines(4096))
    full = activation_plan(config, {"full": 48}, offload=True, **sizes)
    assert full.per_token == SHARED
    assert full.live_layer == LAYER, "the input is back while the layer is computed again"


def test_autocast_casts_for_each_product(config):
    """The residual stream in float32; q, k, v, router and experts read copies of their own."""
    sizes = {"keeps_hidden": True, **BF16, "residual_bytes": 4}
    mixed = activation_plan(config, {"none": 48}, **sizes)
    plain = activation_plan(config, {"none": 48}, keeps_hidden=True, **BF16)
    extra = (2 + 3) * 4096
    assert mixed.per_token - plain.per_token == 48 * extra + SHARED - 32
    assert mixed.backward - plain.backward == 2 * 4096


def test_tokens_that_fit(config):
    plan = activation_plan(config, {"selective": 48}, keeps_hidden=False, **BF16)
    for free in (2, 2.1, 2.3, 2.6, 3, 4, 20):  # up to 2.6 the loss decides, within its first chunk
        for row in (16, 1024):
            fits = plan.fitting(free * 2**30, row)
            assert fits % row == 0
            assert plan.total(fits) <= free * 2**30 < plan.total(fits + row)
    assert plan.fitting(2**30, 4096) == 0
    lines = list(plan.lines(4096))
    assert sum("GiB" in line for line in lines) == 4
    assert "1.00 MB per token" in lines[1]


def test_a_composite_config_is_counted_by_its_decoder():
    config = known_config("Qwen/Qwen3-VL-30B-A3B-Instruct")
    assert config is not None
    plan = activation_plan(config.get_text_config(), {"full": 48}, keeps_hidden=True, **BF16)
    assert plan.live_layer == LAYER + FIRST - INPUT


@pytest.mark.parametrize(
    ("layers", "message"),
    [({"none": 47}, "47 layers, the model has 48"), ({"auto": 48}, "unknown policies")],
    ids=str,
)
def test_counts_add_up(config, layers, message):
    with pytest.raises(ValueError, match=message):
        activation_plan(config, layers, keeps_hidden=True, **BF16)


def test_copies_of_keys_and_values_are_counted(config):
    """torch 2.11's kernels take no grouped ones: 28 more copies of each, of 128 channels."""
    for policy, keeps in (("none", True), ("selective", False)):
        plain = activation_plan(config, {policy: 48}, keeps_hidden=keeps, **BF16)
        copied = activation_plan(
            config, {policy: 48}, keeps_hidden=keeps, repeats_groups=True, **BF16
        )
        one = 2 * 28 * 128 * 2
        layers = 48 if policy == "none" else 0
        assert copied.per_token - plain.per_token == layers * one
        assert copied.live_layer - plain.live_layer == (0 if policy == "none" else one)


def test_the_plan_asks_torch_whether_it_copies(monkeypatch):
    from qwen3_sft.commands.plan import command

    def activations(*options):
        recipe = "config/recipe/qwen3_30b_a3b.yaml"
        lines, _ = command([recipe, "--gpus", "8xH200", "--format", "json", *options])
        return json.loads(next(lines))["activations_gib"]

    fixed = ("--activation_checkpointing", "none")
    plain = activations(*fixed)
    monkeypatch.setattr("qwen3_sft.plan.planner.takes_groups", lambda: False)
    assert activations(*fixed) > plain
    assert activations(*fixed, "--attn_implementation", "flash_attention_2") == plain

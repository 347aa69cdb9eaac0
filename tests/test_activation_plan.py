import pytest
from transformers import Qwen3MoeConfig

from qwen3_sft.activation_plan import activation_plan
from qwen3_sft.known_models import KNOWN_CONFIGS

BF16 = {"compute_bytes": 2, "residual_bytes": 2, "chunk_tokens": 1024}


@pytest.fixture
def config():
    return Qwen3MoeConfig(**KNOWN_CONFIGS["Qwen/Qwen3-30B-A3B"])


def test_published_sizes_of_the_30b(config):
    """Counted by hand in bfloat16: 4,096 input; 8,320 attention; 4,096 each of two outputs."""
    full = activation_plan(config, "full", keeps_hidden=True, **BF16)
    selective = activation_plan(config, "selective", keeps_hidden=False, **BF16)
    none = activation_plan(config, "none", keeps_hidden=True, **BF16)
    ends = 2 * 4096
    assert full.per_token == 48 * 4096 + ends
    assert selective.per_token == 48 * (4096 + 8320 + 2 * 4096 + 8 * 20) + ends
    # Norms 16,384, projections 10,240, rotated 9,216, attention 8,320, routing, first product.
    assert none.per_token == 48 * (16384 + 10240 + 9216 + 8320 + 416 + 24576) + ends
    assert none.live_layer == 0
    assert full.live_layer == none.per_token // 48 - ends // 48
    assert selective.live_layer == full.live_layer - 24576
    assert full.head == 1024 * 151936 * 6 + 151936 * 2048 * 6


def test_what_is_alive_is_what_is_counted():
    """The bytes that a policy adds per token, of a real forward pass in float32."""
    from tests.test_selective_checkpointing import LAYERS, LENGTH, make_model, step

    model = make_model()
    sizes = {"compute_bytes": 4, "residual_bytes": 4, "keeps_hidden": False, "chunk_tokens": 8}
    planned = {
        p: activation_plan(model.config, p, **sizes).per_token for p in ("full", "selective")
    }
    kept = {p: step(model, p)[4] / LENGTH for p in planned}
    assert kept["selective"] - kept["full"] == pytest.approx(
        planned["selective"] - planned["full"], rel=0.05
    )
    deeper = make_model(num_hidden_layers=2 * LAYERS)
    per_layer = (step(deeper, "full")[4] / LENGTH - kept["full"]) / LAYERS
    assert per_layer == pytest.approx(model.config.hidden_size * 4, rel=0.05)


def test_tokens_that_fit(config):
    plan = activation_plan(config, "selective", keeps_hidden=False, **BF16)
    fits = plan.fitting(20 * 2**30, 4096)
    assert fits % 4096 == 0
    assert plan.total(fits) <= 20 * 2**30 < plan.total(fits + 4096)
    assert plan.fitting(2**30, 4096) == 0
    assert sum("GiB" in line for line in plan.lines(fits)) == 3

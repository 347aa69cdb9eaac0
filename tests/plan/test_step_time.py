"""The expected time against the performance model it comes from, and against its own limits."""

from __future__ import annotations

import pytest
from transformers import Qwen3MoeConfig

from qwen3_sft.families.known_models import KNOWN_CONFIGS
from qwen3_sft.hardware import DEVICES
from qwen3_sft.plan.step_time import EFFICIENCIES, efficiency, step_time

SAC = {"selective": 48}
NONE = {"none": 48}
FULL = {"full": 48}

# Microseconds per token printed by `times` of the performance model (2026-11-21; 12 bytes per
# parameter and update): level, tokens, mean length, our policy and theirs, forward dense, experts,
# attention, memory; backward the same; lm_head, recomputed, optimizer.
PRINTED = [
    ("good", 65536, 4096, SAC, (2.8263, 6.6918, 3.0973, 1.52), (5.9261, 16.3578, 10.0663, 3.44),
     3.4278, 6.7914, 1.5529, 15454.7),
    ("good", 16384, 4096, NONE, (2.8263, 7.0007, 3.0973, 1.52), (5.9261, 17.1128, 10.0663, 3.44),
     3.4278, 0.0, 6.2118, 15785.3),
    ("good", 65536, 4096, FULL, (2.8263, 6.6918, 3.0973, 1.52), (5.9261, 16.3578, 10.0663, 3.44),
     3.4278, 14.1355, 1.5529, 13809.0),
    ("good", 2048, 2048, NONE, (2.8263, 9.8833, 1.5487, 1.52), (5.9261, 24.1592, 5.0332, 3.44),
     3.4278, 0.0, 49.6942, 9062.3),
    ("target", 65536, 4096, SAC, (2.7016, 6.1342, 2.6844, 1.2), (5.6526, 14.722, 8.9478, 2.7158),
     3.2719, 6.1903, 1.4712, 17446.4),
    ("limit", 65536, 577, SAC, (2.3314, 4.5994, 0.3501, 1.0605), (4.6627, 9.1988, 1.0111, 2.4),
     2.8344, 4.8917, 1.3001, 28868.3),
    ("limit", 2048, 2048, NONE, (2.3314, 7.0413, 1.2428, 1.0605), (4.6627, 14.0826, 3.5887, 2.4),
     2.8344, 0.0, 41.6045, 12368.8),
]  # fmt: skip


@pytest.fixture(scope="module")
def config():
    return Qwen3MoeConfig(**KNOWN_CONFIGS["Qwen/Qwen3-30B-A3B"])


def expected(config, level="good", tokens=65536, length=4096, layers=SAC, **kwargs):
    time = step_time(
        config, kwargs.pop("device", "H200 SXM"), tokens=tokens, mean_length=length, layers=layers,
        keeps_hidden="selective" not in layers, level=level,
        **{"optimizer_bytes": 12.0, **kwargs},
    )  # fmt: skip
    assert time is not None
    return time


@pytest.mark.parametrize(
    "printed", PRINTED, ids=lambda p: f"{p[0]} {p[1]} {p[2]} {next(iter(p[3]))}"
)
def test_parts_are_those_of_the_model(config, printed):
    level, tokens, length, layers, forward, backward, head, again, optimizer, rate = printed
    time = expected(config, level, tokens, length, layers)
    rates = efficiency("H200", level)
    factor = (1 + rates.overhead) * tokens * 1e-6
    names = ("dense", "experts", "attention", "memory_passes")
    for name, there, back in zip(names, forward, backward, strict=True):
        assert time.parts[name] == pytest.approx((there + back) * factor, rel=1e-4)
    assert time.parts["lm_head"] == pytest.approx(head * factor, rel=1e-4)
    assert time.parts["optimizer"] == pytest.approx(optimizer * tokens * 1e-6, rel=1e-4)
    # The model takes 5/9 of the router with q, k and v; ours computes all of its logits again.
    router = 2 * 48 * 2048 * 128 * 4 / 9 / (rates.dense[0] * 1e6) if layers is SAC else 0.0
    assert time.parts["recompute"] == pytest.approx((again + router) * factor, rel=1e-4)
    assert time.parts["communication"] == 0
    assert time.tokens_per_second == pytest.approx(rate, rel=5e-4)


def test_published_figures(config):
    """Section 3 of the performance model, in thousands of tokens per second."""
    assert expected(config).tokens_per_second == pytest.approx(15.5e3, rel=5e-3)
    assert expected(config, "target").tokens_per_second == pytest.approx(17.4e3, rel=5e-3)
    b200 = expected(config, device="B200").tokens_per_second
    assert b200 == pytest.approx(35.44e3, rel=2e-3)


def test_policies_mix_and_experts_without_first_product(config):
    full, none = expected(config, layers=FULL), expected(config, layers=NONE)
    half = expected(config, layers={"full": 24, "none": 24})
    assert half.step_s == pytest.approx((full.step_s + none.step_s) / 2)
    without = step_time(
        config, "H200", tokens=65536, mean_length=4096, layers=NONE, keeps_hidden=False,
        optimizer_bytes=12,
    )  # fmt: skip
    assert without is not None
    # Two thirds of the forward's experts.
    assert without.parts["recompute"] == pytest.approx(6.6918e-6 * 2 / 3 * 1.05 * 65536, rel=1e-4)


def test_one_update_for_several_micro_batches(config):
    one, four = expected(config), expected(config, accumulation=4)
    assert four.tokens == 4 * one.tokens
    assert four.parts["optimizer"] == one.parts["optimizer"]
    assert four.parts["experts"] == pytest.approx(4 * one.parts["experts"])
    fewer = expected(config, label_fraction=0.5)
    assert fewer.parts["lm_head"] == pytest.approx(one.parts["lm_head"] / 2)


def test_short_micro_batches_show_the_gathering(config):
    """From about 10,000 tokens per GPU computation hides it (section 4, float32 gradients)."""

    def exposed(tokens):
        time = expected(config, "target", tokens=tokens, layers=NONE, shards=8, length=4096)
        return time.parts["communication"]

    assert exposed(4096) > 0.1
    assert exposed(16384) == 0
    eight = expected(config, shards=8).parts["optimizer"]
    assert eight == pytest.approx(expected(config).parts["optimizer"] / 8)


def test_other_models_and_devices(config):
    large = Qwen3MoeConfig(**KNOWN_CONFIGS["Qwen/Qwen3-235B-A22B"])
    layers = {"selective": large.num_hidden_layers}
    assert 5 < expected(large, layers=layers).step_s / expected(config).step_s < 10
    names = {spec.name for spec in DEVICES}
    assert set(EFFICIENCIES) <= names
    assert all(row.source for rows in EFFICIENCIES.values() for row in rows.values())
    for device in ("RTX 4090", "H200 NVL", "no such device"):
        assert efficiency(device) is None
        assert step_time(
            config, device, tokens=4096, mean_length=4096, layers=NONE, keeps_hidden=True,
            optimizer_bytes=12,
        ) is None  # fmt: skip
    assert efficiency("NVIDIA H100 80GB HBM3") is EFFICIENCIES["H100 SXM"]["good"]
    assert efficiency("B200", "target") is None

"""The conventions of other projects give the figures that these have published."""

from __future__ import annotations

from importlib import import_module

import pytest

from qwen3_sft.demo.model import tiny_config
from qwen3_sft.model.meta_model import known_config
from tests.support.source_tree import ROOT

TORCHTITAN, NVIDIA = "torchtitan_flops_per_token", "nvidia_flops_per_token"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    return import_module("parts.flops_conventions")


@pytest.fixture(scope="module")
def qwen3_30b():
    return known_config("Qwen/Qwen3-30B-A3B")


@pytest.mark.parametrize(
    ("length", "torchtitan", "nvidia"),
    [
        (2048, 23.08, 20.59),
        (4096, 27.91, 23.01),
        (8192, 37.58, 27.84),
        (12288, 47.24, 32.67),
        (32768, 95.56, 56.83),
        (131072, 327.5, 172.8),
    ],
)
def test_gflop_per_token_of_qwen3_30b_a3b(bench, qwen3_30b, length, torchtitan, nvidia):
    rounding = 0.05 if length == 131072 else 0.005
    for name, gflop in ((TORCHTITAN, torchtitan), (NVIDIA, nvidia)):
        assert getattr(bench, name)(qwen3_30b, length) / 1e9 == pytest.approx(gflop, abs=rounding)


# Tokens per second are published rounded to a whole number, so TFLOP/s agree to that rounding.
@pytest.mark.parametrize(
    ("convention", "tokens_per_second", "length", "published_tflops"),
    [
        (TORCHTITAN, 6260, 12288, 295.72),  # TorchTitan, 8 x H200
        (TORCHTITAN, 829, 4096, 23.15),  # TorchTitan baseline
        (NVIDIA, 12040, 4096, 277.0),  # NeMo Automodel, 8 x H100
        (NVIDIA, 13011.378, 4096, 299.352),  # Megatron-Bridge, 16 x H100
        (NVIDIA, 459.374, 32768, 26.12),  # Megatron-Bridge SFT, 32k
    ],
)
def test_published_figures_are_reproduced(
    bench, qwen3_30b, convention, tokens_per_second, length, published_tflops
):
    tflops = tokens_per_second * getattr(bench, convention)(qwen3_30b, length) / 1e12
    assert tflops == pytest.approx(published_tflops, rel=0.5 / tokens_per_second + 2e-4)


def test_nvidias_convention_takes_dense_layers_for_moe_layers(bench):
    per_token = bench.nvidia_flops_per_token
    dense_first = tiny_config(512, mlp_only_layers=[0])
    assert per_token(dense_first, 64) == per_token(tiny_config(512), 64)

"""Training with our experts follows the loss curve of transformers' own."""

import json

import pytest

from tests.support.interpreter import use_kernels
from tests.support.training import PATCHES, Documents, make_trainer


def losses(tiny_moe, tokenizer, folder, experts, steps):
    """The loss of every step; the experts stay transformers' grouped_mm if `experts` is None."""
    others = [name for name in PATCHES if name != "scatter_moe"]
    trainer = make_trainer(
        tiny_moe, tokenizer, folder, max_steps=steps, documents=Documents(6, len(tokenizer)),
        patches=[*others, *([experts] if experts else [])], aux=1e-3,
    )  # fmt: skip
    trainer.train()
    used = experts or "grouped_mm"
    assert trainer.model.config._experts_implementation == used
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").open()]


@pytest.mark.parametrize(
    ("experts", "kernels", "steps"),
    [
        ("scatter_moe", False, 20),
        ("scatter_moe_recompute", False, 20),
        # Interpreted, a step takes seconds; tests/gpu runs twenty.
        pytest.param("scatter_moe", True, 5, marks=pytest.mark.kernel),
    ],
)
def test_same_curve(tiny_moe, tokenizer, tmp_path, monkeypatch, experts, kernels, steps):
    expected = losses(tiny_moe, tokenizer, tmp_path / "upstream", None, steps)
    assert len(expected) == steps
    assert expected[-1] < 0.9 * expected[0]
    if kernels:
        use_kernels(monkeypatch)
    got = losses(tiny_moe, tokenizer, tmp_path / "ours", experts, steps)
    assert got == pytest.approx(expected, rel=1e-3)

from importlib import import_module

import pytest

from tests.support.source_tree import ROOT

REFERENCE = "fp32 AdamW, in backward, per tensor"
LOW_BIT = "bf16 AdamW8bit, in backward, per tensor"
NEAREST = "bf16 AdamW8bit, in backward, per tensor, rounded to nearest"


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Train a variant of bench/learning.py on the demo's pairs, which are built once."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    learning = import_module("learning")
    pairs, tokenizer = learning.demo_pairs(tmp_path / "demo")
    return lambda name, **how: learning.train(name, pairs, tokenizer, tmp_path / "run", **how)


@pytest.mark.learning
def test_low_bit_in_backward_learns_as_float32_does(train):
    for seed in (0, 1):
        how = {"seed": seed, "steps": 120, "rows": 8}
        reference, low_bit = train(REFERENCE, **how), train(LOW_BIT, **how)
        assert reference["loss"] < reference["first_loss"] - 1.5
        assert low_bit["loss"] == pytest.approx(reference["loss"], rel=0.01)


@pytest.mark.learning
def test_small_updates_arrive_only_with_stochastic_rounding(train):
    for seed in (0, 1):
        how = {"seed": seed, "steps": 60, "rows": 4, "learning_rate": 1e-4}
        runs = {name: train(name, **how) for name in (REFERENCE, LOW_BIT, NEAREST)}
        learned = {name: run["first_loss"] - run["loss"] for name, run in runs.items()}
        assert learned[LOW_BIT] == pytest.approx(learned[REFERENCE], rel=0.05), learned
        assert learned[NEAREST] < 0.9 * learned[REFERENCE], learned
        assert abs(runs[LOW_BIT]["lost_update_mass"]) < 0.05
        assert runs[NEAREST]["lost_update_mass"] > 0.3
        # As many weights stay where they are in one step: it is the mean that arrives.
        assert runs[LOW_BIT]["lost_update_fraction"] > 0.5

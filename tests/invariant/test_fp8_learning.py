"""Do experts in FP8 learn as experts in bfloat16 do? `pytest -s -m learning` prints the losses.

Weights in float32, products in bfloat16 by autocast, the pairs of bench/learning.py in one order.
"""

import json
from importlib import import_module
from statistics import fmean

import pytest

from monkey_patch.experts_fp8 import experts_fp8
from monkey_patch.scatter_moe import SCATTER_MOE
from qwen3_sft.demo.model import tiny_config, tiny_model
from tests.support.source_tree import ROOT
from tests.support.training import make_trainer

# Six layers, of which four convert; two blocks in D and in 2F, the last one shorter.
SIZES = {
    "num_hidden_layers": 6, "hidden_size": 160, "moe_intermediate_size": 96, "num_experts": 8,
    "head_dim": 32,
}  # fmt: skip
STEPS, ROWS, LAST = 300, 8, 20
OTHERS = ("varlen_attention", "router_aux_loss", "linear_cross_entropy")


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Return a function that trains with an experts patch: first loss, mean of the last ones."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    pairs, tokenizer = import_module("learning").demo_pairs(tmp_path / "demo")

    def run(experts, all_layers=False):
        model = tiny_model(tiny_config(len(tokenizer), **SIZES), 0)
        trainer = make_trainer(
            model, tokenizer, tmp_path / "run", documents=pairs, patches=(experts, *OTHERS),
            max_steps=STEPS, per_device_train_batch_size=ROWS, bf16=True,
            learning_rate=1e-3, lr_scheduler_type="linear", warmup_steps=10, max_grad_norm=1.0,
        )  # fmt: skip
        if all_layers:
            for layer in trainer.model.model.layers:
                layer.mlp.experts.fp8_scaling = "blockwise"
        trainer.train()
        losses = [json.loads(line)["loss"] for line in (tmp_path / "run/metrics.jsonl").open()]
        return losses[0], fmean(losses[-LAST:])

    return run


@pytest.mark.learning
def test_experts_in_fp8_learn_as_in_bfloat16(train):
    """Within 0.5% with the outer layers kept; beside it without them, and rowwise."""
    first, reference = train(SCATTER_MOE)
    runs = {
        "blockwise, 4 of 6 layers": train(experts_fp8()),
        "blockwise, all layers": train(experts_fp8(), all_layers=True),
        "rowwise, 4 of 6 layers": train(experts_fp8(scaling="rowwise")),
    }
    lines = [
        f"{name:26s} {loss:.4f} {loss / reference - 1:+.2%}" for name, (_, loss) in runs.items()
    ]
    print(f"\n{'bfloat16':26s} {reference:.4f}, at first {first:.4f}", *lines, sep="\n")  # noqa: T201
    assert reference < first - 1.5
    assert len({reference, *(loss for _, loss in runs.values())}) == 4, "FP8 was not on"
    assert runs["blockwise, 4 of 6 layers"][1] == pytest.approx(reference, rel=0.005)

"""Adafactor in slices with full gradients: the exact clip, accumulation, resume."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import TrainerCallback
from transformers.optimization import Adafactor

from qwen3_sft.optimizers import adafactor as adafactor_step
from qwen3_sft.optimizers.adafactor import SlicedAdafactor
from tests.support.oracle import assert_close
from tests.support.training import make_trainer, weights

ARGUMENTS = {
    "optim": "adafactor", "max_steps": 4, "weight_decay": 0.1, "warmup_steps": 2,
    "lr_scheduler_type": "cosine", "aux": 0.01, "gradient_accumulation_steps": 2,
    "max_grad_norm": 0.1,
}  # fmt: skip
SLICED = {"optim_args": "bf16_stochastic_round=True"}


@pytest.fixture(autouse=True)
def _small_slices(monkeypatch):
    monkeypatch.setattr(adafactor_step, "SLICE", 1 << 12)  # a few rows or experts at a time


def test_float32_weights_are_those_of_transformers_own(tiny_moe, tokenizer, tmp_path):
    """With accumulation and a clip that holds in every step; in float32 nothing is rounded."""
    results = []
    for more, kind in (({}, Adafactor), (SLICED, SlicedAdafactor)):
        trainer = make_trainer(tiny_moe, tokenizer, tmp_path, **ARGUMENTS, **more)
        trainer.train()
        assert type(trainer.optimizer.optimizer) is kind
        assert min(r["grad_norm"] for r in trainer.state.log_history if "loss" in r) > 0.1
        results.append(weights(trainer.model))
    for name, tensor in results[0].items():
        assert not torch.equal(tensor, dict(tiny_moe.named_parameters())[name]), name
        assert_close(results[1][name], tensor, name=name)


def test_small_updates_of_bfloat16_weights_are_not_lost():
    """A thousand steps of 1e-4 of a weight of one, where bfloat16 has 128 values from 1 to 2."""
    weight = torch.nn.Parameter(torch.ones(1 << 12, dtype=torch.bfloat16))
    optimizer = SlicedAdafactor([weight], lr=1e-4, scale_parameter=False, relative_step=False)
    torch.manual_seed(0)
    for _ in range(1000):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert weight.float().mean().item() == pytest.approx(1 - 0.1, abs=0.005)
    nearest = torch.nn.Parameter(torch.ones(1 << 12, dtype=torch.bfloat16))
    plain = Adafactor([nearest], lr=1e-4, scale_parameter=False, relative_step=False)
    for _ in range(10):
        nearest.grad = torch.ones_like(nearest)
        plain.step()
    assert torch.equal(nearest, torch.ones_like(nearest)), "the test would see a difference"


class _Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= 2


def test_resume_is_bit_exact(tiny_moe, tokenizer, tmp_path):
    model = copy.deepcopy(tiny_moe).to(torch.bfloat16)
    arguments = {**ARGUMENTS, **SLICED, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(model, tokenizer, tmp_path / "a", **arguments)
    whole.train()
    first = make_trainer(model, tokenizer, tmp_path / "b", callbacks=(_Stop(),), **arguments)
    first.train()
    resumed = make_trainer(model, tokenizer, tmp_path / "b", **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    states = [t.optimizer.state_dict()["state"] for t in (whole, resumed)]
    for number, state in states[0].items():
        for key, value in state.items():
            other = states[1][number][key]
            if isinstance(value, torch.Tensor):
                assert value.dtype is torch.float32, key
                assert torch.equal(value, other), (number, key)
            else:
                assert value == other, (number, key)
    for name, tensor in weights(whole.model).items():
        assert torch.equal(tensor, weights(resumed.model)[name]), name


@pytest.mark.parametrize("wrong", [{"beta1": 0.9}, {"relative_step": True, "lr": None}])
def test_what_it_cannot_do_is_refused(wrong):
    values = {"lr": 1e-3, "scale_parameter": False, "relative_step": False} | wrong
    with pytest.raises(ValueError, match="does not step in slices"):
        SlicedAdafactor([torch.nn.Parameter(torch.ones(2))], **values)

"""Two ranks under DDP: equal weights and gradients, generators that differ, equal updates."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import TrainerCallback

from qwen3_sft.optimizers.adafactor import SlicedAdafactor
from qwen3_sft.optimizers.rounding_noise import RoundingNoise
from tests.support.training import make_trainer


def adafactor(parameters):
    return SlicedAdafactor(parameters, lr=1e-4, relative_step=False, scale_parameter=False)


def eight_bits(parameters):
    from torchao.optim import AdamW8bit

    return AdamW8bit(parameters, lr=1e-4, bf16_stochastic_round=True)


def updated(make, rank_seed, *, steps=(0, 1), is_alike=True):
    """Return the weights after steps of one rank, whose generator has the given seed."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(64, 64).bfloat16())
    gradients = torch.randn(2, 64, 64).bfloat16()
    optimizer, now = make([weight]), [0]
    if is_alike:
        RoundingNoise(optimizer, 42, lambda: now[-1])
    torch.manual_seed(rank_seed)
    with torch.compiler.set_stance("force_eager"):
        for step, gradient in zip(steps, gradients, strict=True):
            now.append(step)
            weight.grad = gradient
            optimizer.step()
    return weight.detach(), torch.rand(1)


@pytest.mark.parametrize("make", [adafactor, eight_bits])
def test_ranks_round_alike(make):
    first, second = updated(make, 1), updated(make, 2)
    assert torch.equal(first[0], second[0])
    torch.manual_seed(1)
    assert torch.equal(first[1], torch.rand(1)), "the generator goes on as if nothing were drawn"
    apart = [updated(make, seed, is_alike=False)[0] for seed in (1, 2)]
    assert not torch.equal(*apart)


def test_each_step_has_noise_of_its_own():
    assert not torch.equal(updated(adafactor, 1)[0], updated(adafactor, 1, steps=(0, 0))[0])


class Draws(TrainerCallback):
    """Another rank's generator: it is seeded anew before each update."""

    def __init__(self, seed):
        self.seed = seed

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        torch.manual_seed(self.seed)


def test_the_trainer_rounds_by_seed_and_step(tiny_moe, tokenizer, tmp_path):
    weights = []
    for name, seed in (("a", 1), ("b", 2)):
        model = copy.deepcopy(tiny_moe).to(torch.bfloat16)
        trainer = make_trainer(
            model, tokenizer, tmp_path / name, optim="adafactor", max_steps=2,
            optim_args="bf16_stochastic_round=True",
        )  # fmt: skip
        trainer.add_callback(Draws(seed))
        trainer.train()
        weights.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))

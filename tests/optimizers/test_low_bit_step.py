import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchao.optim import AdamW4bit, AdamW8bit, AdamWFp8

from qwen3_sft.optimizers import low_bit_step
from qwen3_sft.optimizers.in_backward import BackwardOptimizer
from qwen3_sft.optimizers.low_bit_step import Clip, LowBitStep


class _Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation makes anew."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func.is_view:
            given = {t.untyped_storage().data_ptr() for t in args if type(t) is torch.Tensor}
            if type(result) is torch.Tensor and result.untyped_storage().data_ptr() not in given:
                self.bytes = max(self.bytes, result.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("optimizer_class", [AdamW8bit, AdamWFp8, AdamW4bit])
def test_slices_change_no_bit_and_bound_the_temporaries(monkeypatch, optimizer_class):
    weight, gradients = torch.randn(3, 128, 100), torch.randn(2, 3, 128, 100)
    results = []
    for size in (1 << 30, 1024):
        monkeypatch.setattr(low_bit_step, "SLICE", size)
        parameter = torch.nn.Parameter(weight.clone())
        step = LowBitStep(optimizer_class([parameter], lr=1e-2))
        clip = Clip(torch.tensor(1.0), torch.tensor(math.inf), torch.tensor(1.0))
        for number, gradient in enumerate(gradients):
            parameter.grad = gradient.clone()
            largest = _Largest()
            with torch.no_grad(), largest:
                step(parameter, step.optimizer.param_groups[0], clip)
            if number and size == 1024:  # the first step makes the states
                assert 0 < largest.bytes <= 8 * size  # int64 codes
        results.append(parameter.detach())
    assert torch.equal(*results)
    assert not torch.equal(results[0], weight)


@pytest.mark.slow
def test_the_compiled_update_equals_the_eager_one(monkeypatch):
    monkeypatch.setattr(low_bit_step, "SLICE", 8192)
    weight, gradient = torch.randn(5, 4096), torch.randn(5, 4096)
    results = []
    for is_compiled in (False, True):
        parameter = torch.nn.Parameter(weight.clone())
        step = LowBitStep(AdamW8bit([parameter], lr=1e-2))
        if is_compiled:
            monkeypatch.setattr(low_bit_step, "_update", step._compiled)
        clip = Clip(torch.tensor(2.0), torch.tensor(0.5), torch.tensor(2.0))
        for scale in (1.0, 3.0):
            parameter.grad = scale * gradient
            with torch.no_grad():
                step(parameter, step.optimizer.param_groups[0], clip)
        results.append(parameter.detach())
    # Contracted to fused multiply-adds, a moment may round to the neighbouring code.
    difference = (results[0] - results[1]).abs()
    assert (difference > 1e-6).float().mean() < 0.01
    assert difference.max() < 1e-3


@pytest.mark.parametrize("rounds", [False, True])
def test_lost_updates_tell_plain_from_stochastic_rounding(rounds):
    torch.manual_seed(0)
    model = torch.nn.ParameterDict({"a": torch.ones(64, 1024, dtype=torch.bfloat16)})
    optimizer = AdamW8bit(
        model.parameters(), lr=1e-4, weight_decay=0.0, bf16_stochastic_round=rounds
    )
    fused = BackwardOptimizer(model, optimizer, clip="per_tensor", max_grad_norm=1.0)
    generator = torch.get_rng_state()
    assert fused.lost_updates.drain() == {"lost_update_fraction": None, "lost_update_mass": None}
    assert torch.equal(generator, torch.get_rng_state())
    model["a"].sum().backward()
    fused.end_step(fused.norm().item())
    found = fused.lost_updates.drain()
    # Weights of 1 lie 2^-8 apart downwards: an update of 1e-4 is 0.0256 of that.
    if rounds:
        assert found["lost_update_fraction"] == pytest.approx(1 - 1e-4 * 2**8, abs=3e-3)
        assert found["lost_update_mass"] == pytest.approx(0.0, abs=0.1)
    else:
        assert found == {"lost_update_fraction": 1.0, "lost_update_mass": 1.0}

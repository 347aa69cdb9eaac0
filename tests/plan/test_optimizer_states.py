"""States and temporaries as counted, against the optimizers themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from qwen3_sft.optimizers import adafactor as adafactor_step
from qwen3_sft.optimizers import low_bit_step
from qwen3_sft.optimizers.choice import OptimizerChoice, with_states
from qwen3_sft.optimizers.in_backward import BackwardOptimizer
from qwen3_sft.plan.optimizer_states import (
    _ADAFACTOR_SLICES,
    _SLICES,
    moved_bytes,
    state_bytes,
    update_bytes,
)
from tests.support.fake_step import Allocations

BF16, FP32 = torch.bfloat16, torch.float32
# A stack of matrices, a matrix, one that is too small, one without whole blocks, a vector.
SHAPES = [(8, 96, 64), (256, 64), (16, 64), (65, 97), (512,)]


class Weights(nn.Module):
    def __init__(self, dtype: torch.dtype, shapes: Any = SHAPES) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(shape).to(dtype) for shape in shapes)

    def loss(self) -> torch.Tensor:
        return sum((w.float() ** 2).sum() for w in self.weights)


def make_optimizer(choice: OptimizerChoice, model: nn.Module) -> Any:
    from torchao.optim import AdamW4bit, AdamW8bit
    from transformers.optimization import Adafactor

    if choice.row.states == "adafactor":
        kind: Any = Adafactor
        kwargs: dict[str, Any] = {"scale_parameter": False, "relative_step": False}
    elif choice.row.states == "low_bit":
        kind = AdamW4bit if choice.optim.endswith("4bit") else AdamW8bit
        kwargs = {"block_size": 256}
    else:
        kind, kwargs = torch.optim.AdamW, {"fused": choice.optim.endswith("fused")}
    kind, kwargs = with_states(choice, (kind, kwargs))
    return kind(model.parameters(), lr=1e-3, **kwargs)


def size_of(states: Any) -> int:
    """Bytes of the tensors of states, inside torchao's too; counters apart."""
    total = 0
    for leaf in tree_leaves(states):
        if isinstance(leaf, torch.Tensor) and leaf.dim():
            names = leaf.__tensor_flatten__()[0] if hasattr(leaf, "codes") else ()
            parts = [getattr(leaf, name) for name in names] or [leaf]
            total += sum(part.nbytes for part in parts)
    return total


CHOICES = [
    OptimizerChoice(),
    OptimizerChoice("adamw_torch"),
    OptimizerChoice("adafactor"),
    OptimizerChoice("adafactor", in_backward=True),
    OptimizerChoice("adamw_torch_8bit", in_backward=True),
    OptimizerChoice("adamw_torch_4bit", in_backward=True),
    OptimizerChoice("adamw_torch_8bit", "states=fp8", in_backward=True),
]


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_states_are_those_that_a_step_makes(choice, dtype):
    model = Weights(dtype)
    optimizer = make_optimizer(choice, model)
    if choice.in_backward:
        BackwardOptimizer(model, optimizer, clip="per_tensor", max_grad_norm=1.0)
    model.loss().backward()
    if not choice.in_backward:
        optimizer.step()
    states = [list(state.values()) for state in optimizer.state.values()]
    assert state_bytes(SHAPES, choice, dtype) == size_of(states)


def test_torchao_keeps_small_states_in_the_dtype_of_the_weight():
    """Its own step is compiled, so only the buffers are made here."""
    choice = OptimizerChoice("adamw_torch_8bit")
    model = Weights(BF16)
    optimizer = make_optimizer(choice, model)
    states = [optimizer._new_buffer(w, signed) for w in model.weights for signed in (True, False)]
    assert state_bytes(SHAPES, choice, BF16) == size_of(states)
    in_backward = OptimizerChoice("adamw_torch_8bit", in_backward=True)
    small = 16 * 64 + 65 * 97 + 512
    assert state_bytes(SHAPES, in_backward, BF16) - size_of(states) == 2 * small * (4 - 2)


def test_slices_are_those_of_the_steps():
    assert _SLICES["cpu"][0] == low_bit_step.SLICE
    assert _SLICES["cuda"][0] == low_bit_step._COMPILED_SLICE
    assert _ADAFACTOR_SLICES["cpu"][0] == adafactor_step.SLICE
    assert _ADAFACTOR_SLICES["cuda"][0] == adafactor_step._COMPILED_SLICE


@pytest.mark.parametrize(
    ("choice", "dtype"),
    [
        (OptimizerChoice(), BF16),
        (OptimizerChoice("adamw_torch"), BF16),
        (OptimizerChoice("adamw_torch"), FP32),
        (OptimizerChoice("adafactor"), BF16),
        (OptimizerChoice("adafactor"), FP32),
        (OptimizerChoice("adafactor", in_backward=True), BF16),
        (OptimizerChoice("adamw_torch_8bit", in_backward=True), BF16),
        (OptimizerChoice("adamw_torch_8bit", "states=fp8", in_backward=True), BF16),
    ],
    ids=str,
)
def test_temporaries_of_an_update(choice, dtype):
    """Operator by operator on a CPU; the second update, when the states exist."""
    shapes = [(1 << 10, 1 << 11), (256, 256)]
    model = Weights(dtype, shapes)
    optimizer = make_optimizer(choice, model)
    stepper = None
    if choice.in_backward:
        stepper = BackwardOptimizer(model, optimizer, clip="per_tensor", max_grad_norm=1.0)
    with Allocations(model) as seen:
        for _ in range(2):
            seen.restart()
            for index, weight in enumerate(model.weights):
                weight.grad = torch.ones_like(weight)
                if stepper is not None:
                    stepper._update(index, weight)
            if stepper is None:
                optimizer.step()
                optimizer.zero_grad()
            else:
                stepper.end_step(1.0)
    gradients = sum(w.nbytes for w in model.weights) if stepper is None else model.weights[0].nbytes
    temporaries = seen.peak - seen.alive - gradients
    expected = update_bytes(shapes, choice, dtype, "cpu")
    assert temporaries <= 1.01 * expected + 2**16
    # What torchao's tensors do inside is not seen: 33 of 56 bytes per element are.
    assert expected * (0.5 if choice.row.states == "low_bit" else 0.99) <= temporaries


def test_what_the_30b_keeps():
    """3.02 and 4.03 bytes per parameter with the weights: section 2 of the performance model."""
    shapes = [(128, 1536, 2048), (128, 2048, 768)]
    elements = 128 * 3 * 768 * 2048

    def per_parameter(optim: str, **kwargs: Any) -> float:
        choice = OptimizerChoice(optim, in_backward=True, **kwargs)
        return state_bytes(shapes, choice, BF16) / elements

    assert per_parameter("adamw_torch_8bit") == pytest.approx(2 * (1 + 4 / 256), abs=1e-4)
    fp8 = per_parameter("adamw_torch_8bit", optim_args="states=fp8,block_size=128")
    assert fp8 == 2 * (1 + 4 / 128)
    assert per_parameter("adamw_torch_4bit") == pytest.approx(2 * (0.5 + 4 / 256), abs=1e-4)
    assert per_parameter("adafactor") < 0.01
    assert per_parameter("adamw_torch_fused") == 4
    eight = OptimizerChoice("adamw_torch_8bit", in_backward=True)
    assert update_bytes(shapes, eight, BF16) == 8 << 26
    assert update_bytes(shapes, OptimizerChoice("adamw_torch_8bit"), BF16) == 8 * 128 * 1536 * 2048
    assert moved_bytes(shapes, eight, BF16) == pytest.approx(12.06, abs=0.01)


def test_what_is_not_known_says_so():
    choice = OptimizerChoice("lion_8bit")
    assert "lion_8bit is not counted" in choice.describe()
    assert state_bytes(SHAPES, choice, FP32) == state_bytes(SHAPES, OptimizerChoice(), FP32)
    assert OptimizerChoice().describe() == "optimizer (AdamW, two states)"
    fp8 = OptimizerChoice("adamw_torch_8bit", "states=fp8, block_size=256")
    assert "fp8" in fp8.describe()
    assert OptimizerChoice("adafactor", "bf16_stochastic_round=True").is_sliced
    assert not OptimizerChoice("adafactor").is_sliced

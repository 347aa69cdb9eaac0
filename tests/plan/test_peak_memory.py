"""The plan against every allocation of a training step, at the width of the 30B model.

The plan may be above what is alive at most, never below: it adds up what comes one after the other,
such as the second gradient of a layer's experts and the rows that are gone when it appears.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Qwen3MoeConfig

from monkey_patch.kernels.linear_cross_entropy.chunk import tokens_per_chunk
from qwen3_sft.distributed.engine import Engine
from qwen3_sft.families.known_models import KNOWN_CONFIGS
from qwen3_sft.model.meta_model import model_on_meta
from qwen3_sft.optimizers import low_bit_step
from qwen3_sft.optimizers.choice import OptimizerChoice
from qwen3_sft.optimizers.in_backward import BackwardOptimizer
from qwen3_sft.plan import optimizer_states as optimizer_memory
from qwen3_sft.plan.activations import ActivationPlan, activation_plan
from qwen3_sft.plan.weights import Plan, memory_plan
from tests.support.fake_step import Allocations, as_on_a_gpu, forward, make_model

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")

BF16, FP32 = torch.bfloat16, torch.float32
TOKENS, CHUNK = 65536, tokens_per_chunk(KNOWN_CONFIGS["Qwen/Qwen3-30B-A3B"]["vocab_size"], 2)
POLICIES = [
    ("scatter_moe", {"none": 3}),
    ("scatter_moe", {"full": 3}),
    ("scatter_moe_recompute", {"selective": 3}),
    ("scatter_moe_recompute", {"full": 1, "selective": 1, "none": 1}),
]


@pytest.fixture(scope="module", autouse=True)
def _first_step():
    """The first step of a process imports, and frames of failed imports hold its tensors."""
    measured(wide_config(num_hidden_layers=1), "scatter_moe", {"full": 1}, CHUNK)


class Peaks(NamedTuple):
    """Bytes alive at most in a forward and in a backward pass."""

    forward: int
    backward: int

    @property
    def step(self) -> int:
        return max(self)


def wide_config(**overrides: Any) -> Qwen3MoeConfig:
    values = KNOWN_CONFIGS["Qwen/Qwen3-30B-A3B"] | {"num_hidden_layers": 3} | overrides
    return Qwen3MoeConfig(**values)


def measured(
    config: Any,
    experts: str,
    layers: dict,
    tokens: int,
    *,
    weights: torch.dtype = BF16,
    frees_gradients: bool = True,
    passes: int = 1,
) -> Peaks:
    """Return the peaks of the last pass; float32 weights mean autocast to bfloat16."""
    with as_on_a_gpu(), FakeTensorMode():
        model = make_model(config, weights, experts, layers)
        for parameter in model.parameters() if frees_gradients else ():
            parameter.register_post_accumulate_grad_hook(_free)
        with Allocations(model) as seen, torch.autocast("cpu", BF16, enabled=weights == FP32):
            for _ in range(passes):
                seen.restart()
                loss = forward(model, tokens)
                in_forward = seen.peak
                seen.restart()
                loss.backward()
                del loss
    return Peaks(in_forward, seen.peak)


def _free(parameter: torch.Tensor) -> None:
    parameter.grad = None


def planned(
    config: Any, experts: str, layers: dict, *, weights: torch.dtype = BF16, **kwargs: Any
) -> tuple[Plan, ActivationPlan]:
    memory = memory_plan(
        model_on_meta(config), Engine("single"), weights=weights, compute=BF16, **kwargs
    )
    return memory, activation_plan(
        config, layers, compute_bytes=2, residual_bytes=weights.itemsize,
        keeps_hidden=experts == "scatter_moe",
        chunk_tokens=tokens_per_chunk(config.vocab_size, 2),
    )  # fmt: skip


def total(memory: Plan, activations: int, *left_out: str) -> int:
    parts = memory.components(activations)
    return activations + sum(size for name, size in parts.items() if name not in left_out)


@pytest.mark.parametrize(("experts", "layers"), POLICIES, ids=str)
def test_a_step_that_frees_each_gradient(experts, layers):
    """As with the optimizer in the backward pass, whose own memory is left out here."""
    config = wide_config()
    memory, plan = planned(config, experts, layers, optimizer=OptimizerChoice(in_backward=True))
    less, more = (measured(config, experts, layers, n) for n in (TOKENS, 2 * TOKENS))

    per_token = (more.backward - less.backward) / TOKENS
    assert per_token == pytest.approx(plan.per_token + plan.live_layer + plan.backward, rel=5e-4)
    expected = total(memory, plan.total(2 * TOKENS), "optimizer")
    assert more.step <= expected <= 1.05 * more.step


def test_short_rows_need_most_in_the_loss():
    config, layers = wide_config(), {"selective": 3}
    memory, plan = planned(config, "scatter_moe_recompute", layers)
    less, more = (
        measured(config, "scatter_moe_recompute", layers, n) for n in (2 * CHUNK, 4 * CHUNK)
    )
    assert less.forward > less.backward
    per_token = (more.forward - less.forward) / (2 * CHUNK)
    assert per_token == pytest.approx(plan.per_token + plan.head_per_token, rel=1e-3)
    expected = memory.components()["weights"] + plan.total(4 * CHUNK)
    assert expected == pytest.approx(more.step, rel=1e-3)


def test_gradients_summed_over_micro_batches():
    config, layers = wide_config(), {"selective": 3}
    memory, plan = planned(config, "scatter_moe_recompute", layers, accumulates=True)
    peaks = measured(
        config, "scatter_moe_recompute", layers, 2 * TOKENS, frees_gradients=False, passes=2
    )
    expected = total(memory, plan.total(2 * TOKENS), "optimizer")
    assert peaks.step <= expected <= 1.05 * peaks.step


def test_float32_weights_under_autocast():
    config, layers = wide_config(), {"none": 3}
    choice = OptimizerChoice(in_backward=True)
    memory, plan = planned(config, "scatter_moe", layers, weights=FP32, optimizer=choice)
    peaks = measured(config, "scatter_moe", layers, 2 * TOKENS, weights=FP32)
    expected = total(memory, plan.total(2 * TOKENS), "optimizer")
    assert peaks.step <= expected <= 1.05 * peaks.step


def test_eight_bits_in_the_backward_pass(monkeypatch):
    """The real optimizer, whose slices run eagerly here: few experts, and longer slices."""
    from torchao.optim import AdamW8bit
    from torchao.optim.subclass_8bit import get_qmap_signed, get_qmap_unsigned

    tables = get_qmap_signed(), get_qmap_unsigned()  # cached; fake tensors could not make them
    assert len(tables[0]) == len(tables[1]) == 256
    size = 1 << 22
    monkeypatch.setattr(low_bit_step, "SLICE", size)
    monkeypatch.setitem(optimizer_memory._SLICES, "cuda", (size, 56))
    config = wide_config(num_experts=8, vocab_size=8192, num_hidden_layers=1)
    experts, layers, tokens = "scatter_moe_recompute", {"selective": 1}, 16384
    choice = OptimizerChoice("adamw_torch_8bit", None, in_backward=True)
    memory, plan = planned(config, experts, layers, optimizer=choice)

    with as_on_a_gpu(), FakeTensorMode():
        model = make_model(config, BF16, experts, layers)
        with Allocations(model) as seen:
            optimizer = AdamW8bit(model.parameters(), bf16_stochastic_round=True)
            optimizer.param_groups[0]["lr"] = 1e-3
            stepper = BackwardOptimizer(model, optimizer, clip="per_tensor", max_grad_norm=1.0)
            for _ in range(2):
                seen.restart()
                forward(model, tokens).backward()
                stepper.end_step(1.0)
            lasting = seen.alive
            peak = seen.peak
    parts = memory.components()
    assert lasting == pytest.approx(parts["weights"] + parts["optimizer"], rel=1e-3)
    expected = total(memory, plan.total(tokens))
    assert peak <= expected
    # Rows of the experts are gone when their weights are updated: one or the other counts.
    assert expected - parts["temporaries"] <= 1.05 * peak

"""What torch compiles is counted, and what it compiles again late in a run is named."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from torch._dynamo.utils import DEFAULT_COMPILATION_METRICS_LIMIT, set_compilation_metrics_limit
from transformers import TrainerState

from qwen3_sft.model.layer_compile import RecompileWatch


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch.compiler.reset()


class Scaled(torch.nn.Module):
    """Compiled again whenever the factor changes."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = 1.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * math.sqrt(self.factor)


def test_a_late_recompilation_is_named_once(caplog):
    module, watch, state = Scaled(), RecompileWatch(), TrainerState()
    compiled = torch.compile(module, backend="eager", dynamic=False)
    compiled(torch.ones(2))
    watch.on_train_begin(None, state, None)
    for number in range(1, 31):
        state.global_step = number
        module.factor = {5: 2.5, 25: 3.5, 28: 4.5}.get(number, module.factor)
        compiled(torch.ones(2))
        with caplog.at_level(logging.WARNING, logger="qwen3_sft.model.layer_compile"):
            watch.on_step_end(None, state, None)
    assert (watch.compiles_total, watch.recompiles) == (3, 3)
    lines = [r.getMessage() for r in caplog.records if r.name == "qwen3_sft.model.layer_compile"]
    assert [line.split(":")[0] for line in lines] == ["step 25", "step 28"]
    assert "forward was compiled again" in lines[0]
    assert "factor" in lines[0]
    assert "3 recompilations so far" in lines[1]


def test_compilations_are_counted_past_what_torch_remembers():
    module, watch = Scaled(), RecompileWatch()
    compiled = torch.compile(module, backend="eager", dynamic=False, recompile_limit=20)
    set_compilation_metrics_limit(4)
    try:
        watch.on_train_begin(None, TrainerState(), None)
        for number in range(9):
            module.factor = float(number)
            compiled(torch.ones(1))
            if number % 3 == 2:
                watch.on_step_end(None, TrainerState(), None)
    finally:
        set_compilation_metrics_limit(DEFAULT_COMPILATION_METRICS_LIMIT)
    assert (watch.compiles_total, watch.recompiles) == (9, 8)

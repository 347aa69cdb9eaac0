"""Whole steps on CUDA: no wait inside, and compiled layers; `bash bench/gpu.sh` runs it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from qwen3_sft.model.activation_checkpointing import enable_checkpointing
from qwen3_sft.model.layer_compile import compile_layers
from tests.house.test_no_sync import RUNS, trainer_of
from tests.model.test_layer_compile import ROWS, make_model, step
from tests.support.training import Documents

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# Kernels are compiled and tuned, and states made, in the first ones.
WARM_UP, STEPS = 3, 6


def train_watched(trainer: Any) -> None:
    """Train; after the warm-up a wait inside `training_step` is an error."""
    micro_batch, inside = trainer.training_step, []

    def watched(*args: Any, **kwargs: Any) -> Any:
        is_warm = trainer.state.global_step >= WARM_UP
        torch.cuda.set_sync_debug_mode("error" if is_warm else "default")
        try:
            return micro_batch(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            inside.append(trainer.state.global_step)

    trainer.training_step = watched
    trainer.train()
    assert sum(number >= WARM_UP for number in inside) >= STEPS - WARM_UP


@pytest.mark.parametrize("is_compiled", [False, True], ids=["as it is", "compiled"])
@pytest.mark.parametrize("run", RUNS)
def test_a_micro_batch_waits_for_nothing(tiny_moe, tokenizer, tmp_path, run, is_compiled):
    torch.compiler.reset()
    trainer = trainer_of(
        run, tiny_moe, tokenizer, tmp_path, max_steps=STEPS, use_cpu=False, bf16=True,
        documents=Documents(200, len(tokenizer)),
    )  # fmt: skip
    if is_compiled:
        compile_layers(trainer.model)
    train_watched(trainer)


@pytest.mark.parametrize("policy", ["none", "full", "selective"])
def test_compiled_layers_are_one_graph_and_agree(policy):
    """In bfloat16 a router may choose otherwise at a near tie, so losses are compared, loosely."""
    torch.compiler.reset()
    counters.clear()
    model = make_model().cuda().to(torch.bfloat16)
    enable_checkpointing(model, {policy: len(model.model.layers)})
    plain = copy.deepcopy(model)
    compile_layers(model)
    for lengths in ROWS:
        losses = [step(each, lengths)[0].item() for each in (model, plain)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1

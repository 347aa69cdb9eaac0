"""What a run says of its GPU's memory, and which FP8 it takes."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from monkey_patch.kernels.scatter_moe.block import _backend
from monkey_patch.kernels.scatter_moe.triton.rows import grid_of
from monkey_patch.kernels.scatter_moe.triton.tiles import Tiles, architecture_of
from qwen3_sft import errors
from qwen3_sft.model.fp8 import NO_FP8, choose_fp8
from qwen3_sft.options.model_args import ModelArguments
from qwen3_sft.plan.advice import MemorySettings
from qwen3_sft.training import memory_warm_up, plan_check
from qwen3_sft.training.out_of_memory import naming
from tests.fake_gpu.cards import GIB, MULTIPROCESSORS

CUDA = torch.device("cuda")
ON_HOST = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 3221225472 bytes."
FORWARD = "forward and backward of a micro-batch"


def message(error, **settings):
    with pytest.raises(errors.GpuMemoryError) as found, naming(FORWARD, MemorySettings(**settings)):
        raise error
    return str(found.value)


def test_the_gpu_is_out_of_memory(card):
    said = message(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB."))
    total = card.total / GIB
    others = total - 40 - 30  # free and reserved
    assert f"2.50 GiB were wanted; of {total:.2f} GiB this process holds 20.00 GiB" in said
    assert f"end other processes on this GPU (nvidia-smi): {others:.2f} GiB" in said
    assert "expandable_segments:True" in said


def test_the_host_is_out_of_memory_beside_a_gpu(card):
    said = message(RuntimeError(ON_HOST), offload=True)
    assert "3.00 GiB were wanted" in said
    assert "the GPU's memory is another matter" in said
    assert "--activation_offload false" in said
    assert "--max_length" not in said
    assert "--activation_offload" not in message(RuntimeError(ON_HOST))


def test_the_warm_up_names_the_peak(card, monkeypatch):
    peak = memory_warm_up._Peak()
    peak.after("evaluation")
    assert str(peak) == (
        f"peak 40.00 GiB allocated, 60.00 GiB reserved, of {card.total / GIB:.2f} GiB; highest in "
        "start-up"
    )
    seen = []
    monkeypatch.setattr(
        torch.random, "fork_rng", lambda devices: seen.append(devices) or nullcontext()
    )
    with memory_warm_up._same_random_numbers():
        pass
    assert seen == [[0]]


def test_the_plan_is_compared_with_the_peak(card):
    records = []
    metrics = SimpleNamespace(window=SimpleNamespace(stats=SimpleNamespace(tokens=100)))
    check = plan_check.PlanCheck(
        {"weights": 20 * GIB, "activations": 20 * GIB}, None, records.append, metrics, "zero", 2
    )
    args = SimpleNamespace(device=CUDA, optimizer_in_backward=True)
    state = SimpleNamespace(global_step=0, is_world_process_zero=True)
    model = torch.nn.Linear(2, 2)
    check.on_train_begin(args, state, None)
    for step in (0, 1):
        state.global_step = step
        check.on_step_begin(args, state, None)
        metrics.window.stats.tokens += 100
        state.global_step = step + 1
        check.on_step_end(args, state, None, model=model, optimizer=None)
    assert records[0]["peak"] == {"planned": 40 * GIB, "measured": 40 * GIB, "difference": 0}
    assert records[0]["is_within_tolerance"]
    assert card.waits == 2  # around the second half of the steps


def options(**values):
    return ModelArguments(model_name_or_path="some/model", **values)


@pytest.mark.parametrize(
    ("name", "scaling", "problem"),
    [
        ("A100 80GB", "blockwise", "sm_80 and FP8 begins with sm_89"),
        ("H200", "mxfp8", "sm_90 and mxfp8 begins with sm_100"),
        ("H200", "blockwise", None),
        ("B200", "mxfp8", None),
    ],
)
def test_fp8_needs_the_card_for_it(insert_card, name, scaling, problem):
    card, wanted = insert_card(name), options(fp8="all", fp8_scaling=scaling)
    if problem:
        with pytest.raises(errors.UsageError, match=f"{card.driver_name} is {problem}"):
            choose_fp8(wanted, CUDA, packing=True)
    else:
        assert choose_fp8(wanted, CUDA, packing=True)
    with FakeTensorMode():
        x = torch.empty(4, 4, dtype=torch.bfloat16, device=CUDA)
    if problem:
        with pytest.raises(ValueError, match=card.driver_name):
            _backend(x, scaling)
    else:
        assert "Plain" not in _backend(x, scaling).__name__


def test_fp8_follows_what_was_measured_on_the_card(insert_card, caplog):
    card, wanted = insert_card("B200"), options(fp8="auto")
    row = {"attention": 1.1, "experts": 0.9, "experts_mxfp8": 1.4, "source": "made up"}
    with caplog.at_level(logging.INFO):
        found = choose_fp8(wanted, CUDA, packing=True, measured={"B200": row})
    assert (found.attention, found.experts) == (True, False)
    assert "--fp8_scaling mxfp8 was faster here: x 1.40" in caplog.text
    assert choose_fp8(wanted, CUDA, packing=True, measured={"H200 SXM": row}) == NO_FP8
    assert card.driver_name in caplog.text


@pytest.mark.parametrize(("name", "architecture"), [("H200", "sm_90"), ("B200", "sm_100")])
def test_a_persistent_kernel_has_a_program_per_multiprocessor(insert_card, name, architecture):
    insert_card(name)
    with FakeTensorMode():
        x = torch.empty(4, device=CUDA)
    persistent = Tiles(64, 64, 64, 4, 3, persistent=True)
    assert grid_of(persistent, 10_000, x) == MULTIPROCESSORS[name]
    assert grid_of(persistent, 5, x) == 5
    assert architecture_of(x) == architecture

"""The memory plan against a real optimizer step and against arithmetic on the 30B model."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from qwen3_sft.demo.model import tiny_config
from qwen3_sft.distributed.engine import Engine
from qwen3_sft.families.known_models import KNOWN_CONFIGS
from qwen3_sft.model.meta_model import known_config, model_on_meta
from qwen3_sft.optimizers.choice import OptimizerChoice
from qwen3_sft.plan.weights import GIB, Plan, memory_plan
from tests.support.source_tree import ROOT

PARAMETERS = 30_532_122_624
BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture(scope="module")
def model():
    config = known_config("Qwen/Qwen3-30B-A3B")
    assert config is not None
    return model_on_meta(config)


def deepspeed(name: str) -> dict:
    return json.loads((ROOT / f"config/deepspeed/{name}.json").read_text(encoding="utf-8"))


def planned(model: Any, engine: Engine, world_size: int = 8, **kwargs: Any) -> Plan:
    weights = BF16 if engine.layout == "zero" else FP32
    return memory_plan(
        model, engine, weights=weights, compute=BF16, world_size=world_size, gpus_per_node=8,
        **kwargs,
    )  # fmt: skip


def test_one_process_needs_what_a_real_step_allocates():
    config = tiny_config(512)
    real = Qwen3MoeForCausalLM(config)
    optimizer = torch.optim.AdamW(real.parameters())
    real(input_ids=torch.arange(64)[None], labels=torch.arange(64)[None]).loss.backward()
    for parameter in real.parameters():  # an expert without a token has no gradient yet
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    optimizer.step()

    def size(tensors) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)

    states = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
    gpu = memory_plan(model_on_meta(config), Engine("single"), weights=FP32, compute=FP32).gpu
    assert gpu == {
        "weights": size(real.parameters()),
        "gradients": size(p.grad for p in real.parameters()),
        "optimizer (AdamW, two states)": size(states),
    }


@pytest.mark.parametrize(
    ("engine", "file", "bytes_per_parameter"),
    [
        (Engine("single"), None, 16),
        (Engine("ddp"), None, 20),
        (Engine("native", 8), None, 16 / 8),
        (Engine("native", 4, 1, 2), None, 16 / 4),
        (Engine("native", 8, 4), None, 16 / 8),
        (Engine("fsdp"), None, 16 / 8),
        (Engine("zero2"), "zero2", 2 + (2 + 4 + 8) / 8),
        (Engine("zero3"), "zero3", 18 / 8),
        (Engine("zero3"), "zero3_offload", 2 / 8),
    ],
    ids=str,
)
def test_bytes_that_stay(model, engine, file, bytes_per_parameter):
    """Of weights, gradients, master weights and optimizer; the rest exists for a moment."""
    plan = planned(model, engine, deepspeed=deepspeed(file) if file else None)
    lasting = ("weights", "gradients, 1", "float32 master", "optimizer", "buckets of DDP")
    rows = {k: v for k, v in plan.gpu.items() if k.startswith(lasting) or k == "gradients"}
    assert sum(rows.values()) == pytest.approx(PARAMETERS * bytes_per_parameter, rel=1e-6)


def test_what_exists_for_a_moment(model):
    layer, head, experts = 623_120_640, 311_164_928, 603_979_776
    gathered = "two layers and the head, gathered"
    moving = "gradients of one layer on their way"
    native = planned(model, Engine("native", 8)).gpu
    assert native[gathered] == (2 * layer + head) * 2
    assert native[moving] == layer * (2 + 4)
    spread = planned(model, Engine("native", 8, 4)).gpu
    assert spread[gathered] == (2 * (layer - experts * 3 // 4) + head) * 2
    assert planned(model, Engine("fsdp")).gpu[moving] == layer * (2 + 2)
    zero3 = planned(model, Engine("zero3"), deepspeed=deepspeed("zero3")).gpu
    assert zero3[gathered] == native[gathered]
    assert zero3["float32 gradients of the update"] == 250_000_000 * 4
    zero2 = planned(model, Engine("zero2"), deepspeed=deepspeed("zero2")).gpu
    assert zero2["float32 gradients of the update"] == PARAMETERS // 8 * 4
    assert zero2["buckets of DeepSpeed"] == 2 * 500_000_000 * 2


EIGHT_BITS = OptimizerChoice("adamw_torch_8bit", "bf16_stochastic_round=True", in_backward=True)


def on_one_gpu(model: Any, optimizer: OptimizerChoice, **kwargs: Any) -> Plan:
    return memory_plan(
        model, Engine("single"), weights=BF16, compute=BF16, optimizer=optimizer, **kwargs
    )


def test_optimizer_in_backward_leaves_one_layers_gradients(model):
    """2 + 2.03 bytes per parameter and 1.6 GiB: section 2 of the performance model has 117 GiB."""
    plan = on_one_gpu(model, EIGHT_BITS)
    parts = plan.components()
    experts = 603_979_776
    assert parts["weights"] == 2 * PARAMETERS
    assert parts["gradients"] == 2 * experts
    assert parts["optimizer"] == pytest.approx(2 * (1 + 4 / 256) * PARAMETERS, rel=1e-3)
    assert parts["temporaries"] == 8 << 26
    assert plan.gpu_gib == pytest.approx(117, abs=1)
    classic = on_one_gpu(model, replace(EIGHT_BITS, in_backward=False)).components()
    assert classic["gradients"] == 2 * PARAMETERS


@pytest.mark.parametrize(
    ("optim", "optim_args", "gib"),
    [
        ("adamw_torch_4bit", "block_size=128", 89.4),
        ("adafactor", None, 59.5),
        ("adamw_torch_8bit", None, 117.0),
    ],
)
def test_static_memory_of_the_performance_model(model, optim, optim_args, gib):
    """It counts the gradients of two whole layers, no temporaries, and 0.01 bytes of factors."""
    parts = on_one_gpu(model, OptimizerChoice(optim, optim_args, in_backward=True)).components()
    gradients = 2 * 2 * 623_120_640 / GIB
    assert (parts["weights"] + parts["optimizer"]) / GIB == pytest.approx(gib - gradients, abs=0.2)


def test_adafactor_with_full_gradients(model):
    """Exact clip and accumulation on one GPU: 114 GiB."""
    choice = OptimizerChoice("adafactor", "bf16_stochastic_round=True")
    plan = on_one_gpu(model, choice, accumulates=True)
    parts = plan.components()
    lasting = parts["weights"] + parts["gradients"] + parts["optimizer"]
    assert lasting / GIB == pytest.approx(114, abs=0.3)
    # New gradients of a layer's experts are added; the update is of slices, after the backward.
    assert parts["temporaries"] == 2 * 603_979_776 + (8 << 26)
    assert plan.components(1 << 40)["temporaries"] == 2 * 603_979_776


def test_what_exists_in_the_step_alone_makes_room_for_activations(model):
    """torch's AdamW without `fused` takes the roots of all moments at once."""
    plan = on_one_gpu(model, OptimizerChoice("adamw_torch"))
    whole = 2 * PARAMETERS
    assert plan.components()["temporaries"] == whole
    less, more = whole // 2, 2 * whole
    assert plan.components(less)["temporaries"] == whole - less
    assert plan.components(more)["temporaries"] == 0
    totals = [sum(plan.components(a).values()) + a for a in (0, less, whole, more)]
    assert totals == [totals[0], totals[0], totals[0], totals[0] + whole]


@pytest.mark.parametrize(
    ("engine", "file"),
    [
        (Engine("single"), None),
        (Engine("ddp"), None),
        (Engine("native", 8), None),
        (Engine("fsdp"), None),
        (Engine("zero2"), "zero2"),
        (Engine("zero3"), "zero3_offload"),
    ],
    ids=str,
)
def test_components_are_all_rows(model, engine, file):
    plan = planned(model, engine, deepspeed=deepspeed(file) if file else None)
    assert sum(plan.components().values()) == sum(plan.gpu.values())
    assert sum("GiB" in line for line in plan.lines(139.0)) == len(plan.gpu) + 2 + len(plan.host)


def test_an_optimizer_that_is_not_known_is_planned_as_adamw(model):
    other = on_one_gpu(model, OptimizerChoice("muon")).gpu
    (row,) = (what for what in other if "muon" in what)
    assert other[row] == 4 * PARAMETERS


def test_a_vision_tower_is_counted():
    config = known_config("Qwen/Qwen3-VL-30B-A3B-Instruct")
    assert config is not None
    plan = on_one_gpu(model_on_meta(config), EIGHT_BITS)
    assert plan.parameters == PARAMETERS + 538_631_408
    assert plan.components()["weights"] == 2 * plan.parameters
    assert plan.components()["gradients"] == 2 * 603_979_776


def test_autocast_copies_every_dense_weight_and_one_expert_tensor(model):
    rows = planned(model, Engine("ddp")).gpu
    (copies,) = (size for what, size in rows.items() if what.startswith("autocast"))
    dense = 48 * (623_120_640 - 603_979_776)
    assert copies == 2 * (dense + 402_653_184)


def test_replicas_do_not_shrink_a_shard(model):
    flat = planned(model, Engine("native", 16), 16)
    hybrid = planned(model, Engine("native", 8, 1, 2), 16)
    one_node = planned(model, Engine("native", 8), 8)
    assert hybrid.gpu == one_node.gpu
    assert (flat.shards, hybrid.shards) == (16, 8)
    assert flat.gpu_gib < hybrid.gpu_gib
    # accelerate's FSDP is told by its own variables
    assert planned(model, Engine("fsdp"), 16, shards=8).gpu == planned(model, Engine("fsdp")).gpu


def test_host_memory(model):
    def host(engine: Engine, file: str | None = None) -> float:
        plan = planned(model, engine, deepspeed=deepspeed(file) if file else None)
        return sum(plan.host.values()) / PARAMETERS

    fused, end = 402_653_184 / PARAMETERS, 311_164_928 / PARAMETERS
    assert host(Engine("ddp")) == pytest.approx(8 * 4 * (1 + fused))  # every process reads all
    assert host(Engine("native", 8)) == pytest.approx(8 * 4 * 2 * end / 8)
    assert host(Engine("fsdp")) == pytest.approx(4 * (1 + fused))  # the first process
    assert host(Engine("zero2"), "zero2") == pytest.approx(8 * 2 * (1 + fused))
    # Rank 0 fuses in bfloat16, then all flatten their shards.
    assert host(Engine("zero3"), "zero3") == pytest.approx(2 * 2 * fused + 2)
    offloaded = host(Engine("zero3"), "zero3_offload") - host(Engine("zero3"), "zero3")
    assert offloaded == pytest.approx(8 + 4 + 4 + 2)


@pytest.fixture(scope="module")
def loaded():
    """What bench/load.py measured: its model on meta, and name -> ranks."""
    report = json.loads((ROOT / "bench/results/load_memory_cpu.json").read_text(encoding="utf-8"))
    config = Qwen3MoeConfig(**{**KNOWN_CONFIGS["Qwen/Qwen3-30B-A3B"], **report["config"]})
    return model_on_meta(config), {r["name"]: r["ranks"] for r in report["results"]}


@pytest.mark.parametrize("name", ["single", "ddp", "fsdp"])
def test_loading_on_the_host_takes_what_was_measured(loaded, name):
    """Where the host holds weights on their way to GPUs, it does so on a CPU just the same."""
    model, ranks = loaded[0], loaded[1][name]
    plan = memory_plan(
        model, Engine(name), weights=FP32, compute=FP32, world_size=len(ranks),
        gpus_per_node=len(ranks),
    )  # fmt: skip
    measured = sum(rank["phases"]["loading"]["anonymous"] for rank in ranks)
    assert sum(plan.host.values()) == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize("name", ["native fsdp 2", "native fsdp 2 x ep 2"])
def test_native_loading_needs_its_shard_and_one_tensor(loaded, name):
    """On a CPU in host memory, on GPUs there; either way it maps only its part of the files."""
    model, ranks = loaded[0], loaded[1][name]
    elements = sum(p.numel() for p in model.parameters())
    tensor = max(p.numel() for p in model.parameters())
    for rank in ranks:
        assert rank["kept"] == pytest.approx(elements // 2 * 4, rel=0.01)
        loading = rank["phases"]["loading"]
        assert loading["anonymous"] == pytest.approx((elements + tensor) // 2 * 4, rel=0.03)
        assert loading["file"] < 0.6 * elements * 2


def test_zero3_reads_in_the_first_process_only(loaded):
    model, (first, other) = loaded[0], loaded[1]["zero3"]
    tensor = max(p.numel() for p in model.parameters())
    assert other["phases"]["loading"]["file"] < 0.02 * first["phases"]["loading"]["file"]
    own = first["phases"]["loading"]["anonymous"] - other["phases"]["loading"]["anonymous"]
    assert 0 < own < 2 * tensor * 2


def test_settings_spare_what_was_there_as_found(loaded):
    """glibc keeps freed experts, and every rank of accelerate's FSDP reads everything."""
    for name in ("native fsdp 2", "fsdp"):
        for found, spared in zip(loaded[1][f"{name} as found"], loaded[1][name], strict=True):
            found_peak = found["phases"]["loading"]["anonymous"]
            assert found_peak > 1.4 * spared["phases"]["loading"]["anonymous"]
    second = loaded[1]["fsdp"][1]["phases"]["loading"]["anonymous"]
    assert second < 0.02 * loaded[1]["fsdp as found"][1]["phases"]["loading"]["anonymous"]

"""What a run finds out about its GPUs before there is a model."""

from __future__ import annotations

import pytest
import torch
from accelerate.state import AcceleratorState

from qwen3_sft import errors, hardware
from qwen3_sft.commands import plan as plan_command
from qwen3_sft.commands import resume
from qwen3_sft.decisions import Machine
from qwen3_sft.distributed import process_group
from qwen3_sft.distributed.engine import Engine
from qwen3_sft.launch import launch, node
from qwen3_sft.launch.node import Cluster
from qwen3_sft.options.recipe import parse_options
from qwen3_sft.training.arguments import check_machine, final_arguments
from tests.fake_gpu.cards import GIB

LEAST = ["--model_name_or_path", "some/model", "--dataset", "rows.jsonl"]


def train(*words):
    return parse_options([*LEAST, *words]).train


@pytest.mark.parametrize(("name", "bf16"), [("H200", 989e12), ("B200", 2250e12)])
def test_the_card_is_the_one_in_the_table(insert_card, name, bf16):
    card = insert_card(name, count=8)
    info, memory = hardware.device_info(), hardware.memory_stats()
    assert (info.name, info.count) == (card.driver_name, 8)
    assert info.memory_gib == memory.total_gib == hardware.find_device(name).memory_gib
    assert info.peak_flops["bf16"] == bf16
    assert (memory.peak_allocated_gib, memory.peak_reserved_gib) == (40, 60)
    assert memory.allocation_retries == 3


def test_the_run_is_for_this_machine(insert_card):
    card = insert_card("H200", count=4)
    machine = Machine.here(train())
    assert machine.gpu.name == card.driver_name
    assert machine.device == torch.device("cuda")
    assert machine.has_bf16
    assert Machine.here(train("--use_cpu", "true")).device.type == "cpu"
    for option in ("--bf16", "--fp16", "--tf32"):
        check_machine(train(option, "true"))
    assert plan_command._gpus_here()[0] == 4
    assert plan_command._gpus_here()[1] == machine.gpu


def test_a_card_without_bfloat16(card, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    assert not Machine.here(train()).has_bf16
    with pytest.raises(errors.UsageError, match="no GPU here that computes in bfloat16"):
        check_machine(train("--bf16", "true"))


@pytest.mark.parametrize("name", ["H200", "B200"])
def test_launchers_count_the_cards(insert_card, monkeypatch, tmp_path, name):
    card = insert_card(name, count=8)
    monkeypatch.setattr(launch, "GPU_FILES", ("null",))
    assert launch._machine() == (8, card.total / GIB)
    card.count = 1
    assert launch._machine() == (1, None)
    card.count = 8
    cluster = Cluster(2, 0, 8, "node0", 29500, "node0", "static", "run", 600, 0)
    given = {}
    monkeypatch.setattr(node, "choose", lambda argv, **facts: given.update(facts))
    node._choose(cluster, LEAST, card.count)
    assert (given["gpus_per_node"], given["nodes"]) == (8, 2)
    assert given["gpu_memory_gib"] == card.total / GIB


@pytest.mark.parametrize(
    ("environment", "backend"),
    [
        ({}, "nccl"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "true"}, "cuda:nccl,cpu:gloo"),
    ],
)
def test_a_process_is_bound_to_its_own_card(insert_card, monkeypatch, environment, backend):
    card, store, given = insert_card(count=2), torch.distributed.HashStore(), {}
    for variable, value in {"WORLD_SIZE": "2", "LOCAL_RANK": "1", **environment}.items():
        monkeypatch.setenv(variable, value)
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        monkeypatch.setattr(
            process_group.distributed_c10d, name, getattr(process_group.distributed_c10d, name)
        )
    monkeypatch.setattr(process_group, "_meet", lambda patience: (store, 1, 2))
    monkeypatch.setattr(
        torch.distributed, "init_process_group",
        lambda backend, **facts: given.update(facts, backend=backend, bound=[*card.chosen]),
    )  # fmt: skip
    assert process_group.join_process_group(60) is store
    assert given["backend"] == backend
    assert given["device_id"] == torch.device("cuda", 1)
    assert given["bound"] == [torch.device("cuda", 1)]  # before NCCL looks


def test_a_resume_on_a_gpu_may_differ_in_the_order_of_sums(card, tmp_path, caplog):
    recorded = {"step": 5, "loss": 1.0, "grad_norm": 2.0}
    near = recorded | {"loss": 1.0 + resume.CUDA_TOLERANCE / 2}
    far = recorded | {"loss": 1.0 + resume.CUDA_TOLERANCE * 2}
    assert resume._judge(tmp_path, recorded, near) == errors.DONE
    assert resume._judge(tmp_path, recorded, far) == errors.FAILED


@pytest.mark.parametrize("count", [1, 2])
def test_one_process_takes_one_card(insert_card, tmp_path, count):
    insert_card(count=count)
    options = parse_options([*LEAST, "--output_dir", str(tmp_path)])
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        if count > 1:
            with pytest.raises(errors.UsageError, match="2 GPUs are visible to one process"):
                final_arguments(options, Engine("single"))
        else:
            args = final_arguments(options, Engine("single"))
            assert (args.device, args.n_gpu) == (torch.device("cuda", 0), 1)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)

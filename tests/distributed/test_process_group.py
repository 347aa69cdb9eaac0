import json
import sys

import pytest
import torch.distributed as dist
from torch.distributed import distributed_c10d

from qwen3_sft.distributed import process_group
from qwen3_sft.distributed.process_group import join_process_group, leave_process_group
from qwen3_sft.errors import ProcessGroupError, UsageError
from tests.support.commands import free_port, run, succeeds


def test_alone_there_is_no_group(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    join_process_group(60)
    assert not dist.is_initialized()
    leave_process_group()


def test_timeout_must_be_positive():
    with pytest.raises(UsageError, match="--dist_timeout_s 0: must be a positive number"):
        join_process_group(0)


def test_says_who_waited_where(monkeypatch):
    port = free_port()
    for name, value in (
        ("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", str(port)),
    ):  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(process_group, "_JOIN_AT_LEAST_S", 1)
    before = distributed_c10d.default_pg_timeout
    with pytest.raises(ProcessGroupError) as caught:
        join_process_group(0.5)
    assert f"rank 0 waited 1 s at 127.0.0.1:{port} and not all of the 2" in str(caught.value)
    assert "--dist_timeout_s" in str(caught.value)
    assert not dist.is_initialized()
    assert distributed_c10d.default_pg_timeout == before


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "nccl"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}, "nccl"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"},
            "cuda:nccl,cpu:gloo",
        ),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "true"}, "cuda:nccl,cpu:gloo"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "nccl"),
    ],
)
def test_backend_on_cuda(monkeypatch, variables, expected):
    for name in ("ACCELERATE_USE_FSDP", "FSDP_STATE_DICT_TYPE", "FSDP_OFFLOAD_PARAMS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert process_group.default_backend(has_cuda=True) == expected
    assert process_group.default_backend(has_cuda=False) == "gloo"


@pytest.mark.faults
def test_one_timeout_for_every_group(tmp_path):
    """Also for groups that accelerate, transformers, meshes and DeepSpeed would create."""
    succeeds(run(
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port",
        free_port(), "-m", "tests.support.process_group_worker", tmp_path,
    ))  # fmt: skip
    for rank in (0, 1):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert found["kept"], "accelerate made a group of its own"
        assert found["timeouts"] == [3.0] * 4
        assert not found["initialized"]
        assert found["left_after_s"] < 2
        if rank == 0:
            assert "Timed out waiting 3000ms" in found["error"]
            assert 2 < found["waited_s"] < 5.5

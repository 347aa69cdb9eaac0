"""Which node of which cluster: plain variables, SLURM's, and every mistake by its name."""

from __future__ import annotations

import os
import re
from dataclasses import replace

import pytest

from qwen3_sft.errors import UsageError
from qwen3_sft.launch.cluster import Cluster, read_cluster

# An address that documentation reserves: nobody's, and found without a name server.
TWO = {
    "NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "198.51.100.1", "LOCAL_ADDR": "198.51.100.2",
    "NPROC_PER_NODE": "8",
}  # fmt: skip
SLURM = {
    "SLURM_NNODES": "2", "SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "gpu[07-08]",
    "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "4711", "SLURM_LOCALID": "0",
    "LOCAL_ADDR": "198.51.100.2",
}  # fmt: skip
CLUSTER = Cluster(2, 1, 8, "198.51.100.1", 29500, "198.51.100.2", "static", "qwen3-sft", 600, 0)


def test_reads_plain_variables():
    assert read_cluster(TWO, gpus=4) == CLUSTER
    assert read_cluster({k: v for k, v in TWO.items() if k != "NPROC_PER_NODE"}, 4).processes == 8
    given = {
        **TWO, "MASTER_PORT": "1234", "MAX_RESTARTS": "2", "RDZV_ID": "mine", "RDZV_TIMEOUT": "60",
    }  # fmt: skip
    assert read_cluster(given, 4) == replace(
        CLUSTER, master_port=1234, rdzv_backend="c10d", rdzv_id="mine", rdzv_timeout_s=60,
        max_restarts=2,
    )  # fmt: skip
    assert read_cluster({**TWO, "RDZV_BACKEND": "c10d"}, 4).max_restarts == 3
    assert read_cluster({**TWO, "MAX_RESTARTS": "0"}, 4).rdzv_backend == "static"


def test_one_node_needs_little():
    alone = read_cluster({"NNODES": "1"}, gpus=2)
    assert (alone.node_rank, alone.master_addr, alone.local_addr) == (0, "127.0.0.1", "127.0.0.1")
    assert alone.processes == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"NNODES": None}, "NNODES is not set: set NNODES, NODE_RANK and MASTER_ADDR"),
        ({"NNODES": "two"}, "NNODES=two: must be a whole number at least 1"),
        ({"NNODES": "0"}, "NNODES=0: must be at least 1"),
        ({"NODE_RANK": None}, "NODE_RANK is not set: set it to 0..1"),
        ({"NODE_RANK": "2"}, "NODE_RANK=2: with NNODES=2 it must be one of 0..1"),
        ({"NODE_RANK": "-1"}, "NODE_RANK=-1: must be a whole number"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not set: set it to node 0's address"),
        ({"MASTER_ADDR": "no-such-node.invalid"}, "no-such-node.invalid is not known here"),
        ({"MASTER_ADDR": "a..b"}, "MASTER_ADDR=a..b is not known here"),
        ({"MASTER_ADDR": "localhost"}, "MASTER_ADDR=localhost is this machine itself"),
        ({"MASTER_ADDR": "127.0.1.1"}, "set MASTER_ADDR to an address of node 0 that they can"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT=65536: must be from 1 to 65535"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT=http: must be a whole number from 1 to 65535"),
        ({"NPROC_PER_NODE": "0"}, "NPROC_PER_NODE=0: must be at least 1"),
        ({"NPROC_PER_NODE": None}, "this node has no GPU: set NPROC_PER_NODE"),
        ({"RDZV_BACKEND": "etcd"}, "RDZV_BACKEND=etcd: must be static or c10d"),
        ({"RDZV_BACKEND": "static", "MAX_RESTARTS": "1"}, "set RDZV_BACKEND=c10d, or MAX_RESTARTS"),
        ({"RDZV_TIMEOUT": "0"}, "RDZV_TIMEOUT=0: must be at least 1"),
        ({"MAX_RESTARTS": "many"}, "MAX_RESTARTS=many: must be a whole number"),
    ],
)
def test_mistakes_are_named(change, message):
    env = {k: v for k, v in {**TWO, **change}.items() if v is not None}
    with pytest.raises(UsageError, match=re.escape(message)):
        read_cluster(env, gpus=0)


@pytest.mark.parametrize(
    "name",
    [
        "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "NPROC_PER_NODE", "LOCAL_ADDR",
        "RDZV_BACKEND", "RDZV_ID", "RDZV_TIMEOUT", "MAX_RESTARTS",
    ],
)  # fmt: skip
@pytest.mark.parametrize("empty", ["", " "])
def test_empty_is_never_a_default(name, empty):
    with pytest.raises(UsageError, match=f"^{name} is set but empty"):
        read_cluster({**TWO, **SLURM, name: empty}, gpus=8)


def test_no_route_to_the_first_node(monkeypatch):
    env = {k: v for k, v in TWO.items() if k != "LOCAL_ADDR"}
    env["MASTER_ADDR"] = "255.255.255.255"  # UDP may not go there unasked
    with pytest.raises(UsageError, match=r"no route from this node to MASTER_ADDR=255\.255"):
        read_cluster(env, gpus=8)


class TestSlurm:
    @pytest.fixture
    def scontrol(self, tmp_path, monkeypatch):
        """A cluster whose first node is called by an address, so that no name server is asked."""
        program = tmp_path / "bin" / "scontrol"
        program.parent.mkdir()
        program.write_text(
            '#!/bin/sh\n[ "$*" = "show hostnames gpu[07-08]" ] || exit 1\n'
            "echo 198.51.100.7\necho 198.51.100.8\n"
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
        return program

    def test_is_read(self, scontrol):
        assert read_cluster(SLURM, gpus=0) == replace(
            CLUSTER, master_addr="198.51.100.7", rdzv_id="4711"
        )

    def test_plain_variables_win(self, scontrol):
        found = read_cluster({**SLURM, **TWO, "NNODES": "3"}, gpus=0)
        assert (found.nodes, found.master_addr) == (3, "198.51.100.1")

    def test_a_nodelist_that_names_nothing(self, scontrol):
        with pytest.raises(UsageError, match="set MASTER_ADDR to node 0's address"):
            read_cluster({**SLURM, "SLURM_JOB_NODELIST": "gpu["}, gpus=0)

    def test_scontrol_is_not_there(self, monkeypatch, tmp_path):
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(UsageError, match=r"`scontrol show hostnames gpu\[07-08\]` names no"):
            read_cluster(SLURM, gpus=0)

    @pytest.mark.parametrize("name", ["SLURM_NNODES", "SLURM_NODEID", "SLURM_JOB_NODELIST"])
    def test_empty(self, scontrol, name):
        with pytest.raises(UsageError, match=f"^{name} is set but empty"):
            read_cluster({**SLURM, name: ""}, gpus=0)

    def test_several_tasks_on_a_node(self, scontrol):
        with pytest.raises(UsageError, match="use --ntasks-per-node=1"):
            read_cluster({**SLURM, "SLURM_LOCALID": "3"}, gpus=0)

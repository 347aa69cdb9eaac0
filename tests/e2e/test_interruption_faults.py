"""Signals to trees of processes, as schedulers send them: 75, a checkpoint, and on it goes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from qwen3_sft.checkpoints.manifest import verify
from tests.support.commands import ROOT, free_port, metrics
from tests.support.faults import outcome
from tests.support.run_inputs import write_inputs

pytestmark = pytest.mark.faults

STEPS = 60
OPTIONS = (
    "--max_length", 64, "--max_steps", STEPS, "--num_train_epochs", STEPS, "--use_cpu", "true",
    "--learning_rate", "1e-3", "--num_samples", 0, "--save_strategy", "no",
    "--gradient_accumulation_steps", 2,
)  # fmt: skip
GLOO = ("--ddp_backend", "gloo")
WEIGHTS = "model/model.safetensors"
COMPARED = ("loss", "grad_norm", "tokens", "learning_rate")


@pytest.fixture(scope="module")
def inputs(tokenizer, tmp_path_factory):
    return (*write_inputs(tmp_path_factory.mktemp("inputs"), tokenizer), *OPTIONS)


class Run:
    """A started command with its log, and what can be done to it."""

    def __init__(self, folder, name, command, **environment):
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / f"{name}.log"
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [str(word) for word in command], cwd=ROOT, env=env, stdout=log, stderr=log
            )

    def tree(self):
        """The launcher, then all below it."""
        launcher = psutil.Process(self.process.pid)
        return [launcher, *launcher.children(recursive=True)]

    def workers(self):
        """The training processes by rank: those without children of this program."""
        found = {}
        for process in self.tree()[1:]:
            environment = process.environ()
            if "qwen3_sft.train" in process.cmdline() and "RANK" in environment:
                found[int(environment["RANK"])] = process
        return found

    def wait_for(self, condition, limit_s=120):
        end = time.monotonic() + limit_s
        while not condition():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.02)

    def end(self, limit_s=120):
        """Return the exit code; nothing may be left of the tree."""
        tree = self.tree()
        code = self.process.wait(limit_s)
        left = psutil.wait_procs(tree[1:], timeout=1)[1]
        assert left == [], self.log.read_text()
        return code


def on_two_processes(folder, name, inputs):
    """`qwen3-sft train` as on two GPUs."""
    launch_file = folder / "two.json"
    launch_file.parent.mkdir(parents=True, exist_ok=True)
    config = json.loads((ROOT / "config" / "ddp.json").read_text())
    config |= {"num_processes": 2, "main_process_port": free_port()}
    launch_file.write_text(json.dumps(config))
    command = (sys.executable, "-m", "qwen3_sft.cli", "train", *inputs, *GLOO,
               "--output_dir", folder / "run")  # fmt: skip
    return Run(folder, name, command, ACCELERATE_CONFIG=str(launch_file))


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    run = on_two_processes(folder, "log", inputs)
    assert run.end() == 0, run.log.read_text()
    return folder / "run"


def trains(folder):
    """Whether a few steps are done."""
    return lambda: (folder / "metrics.jsonl").is_file() and len(metrics(folder)) > 2


def check_interrupted(run, folder, signal_name):
    """Everything that an interrupted run leaves; returns its last step."""
    text = run.log.read_text()
    note = json.loads((folder / "INTERRUPTED").read_text())
    assert note["signal"] == signal_name
    assert text.count(f"interrupted by {signal_name} at step {note['step']}: saved") == 1, text
    assert 0 < note["step"] < STEPS
    assert [path.name for path in folder.glob("checkpoint-*")] == [f"checkpoint-{note['step']}"]
    verify(folder / f"checkpoint-{note['step']}")
    assert not (folder / "model").exists()
    return note["step"]


@outcome(
    "SIGTERM or SIGUSR1 to the launcher or to any one rank",
    "all ranks save at the end of the step; exit code 75, `INTERRUPTED`; the same command goes "
    "on, exactly",
)
def test_one_of_two_ranks_is_signalled_and_the_run_goes_on(inputs, undisturbed, tmp_path):
    folder = tmp_path / "run"
    run = on_two_processes(tmp_path, "first", inputs)
    run.wait_for(trains(folder))
    run.workers()[1].send_signal(signal.SIGUSR1)
    assert run.end() == 75, run.log.read_text()
    step = check_interrupted(run, folder, "SIGUSR1")
    assert "Traceback" not in run.log.read_text()
    again = on_two_processes(tmp_path, "second", inputs)
    assert again.end() == 0, again.log.read_text()
    assert f"resuming from {folder / f'checkpoint-{step}'}" in again.log.read_text()
    assert [[r[k] for k in COMPARED] for r in metrics(folder)] == [
        [r[k] for k in COMPARED] for r in metrics(undisturbed)
    ]
    assert (folder / WEIGHTS).read_bytes() == (undisturbed / WEIGHTS).read_bytes()
    assert not (folder / "INTERRUPTED").exists()


@outcome("SIGTERM to every process at once, data workers included", "the same")
@outcome("A second signal, also during the save", "the save is finished; the second is ignored")
def test_every_process_is_signalled_twice(inputs, tmp_path):
    """torchrun ends its workers when it gets SIGTERM itself: they have the time to save.

    What loads their data is signalled as well.
    """
    folder = tmp_path / "run"
    run = on_two_processes(tmp_path, "log", (*inputs, "--dataloader_num_workers", 2))
    run.wait_for(trains(folder))
    run.wait_for(lambda: len(run.tree()) == 8)  # two launchers, two ranks, two workers each
    for _ in range(2):
        for process in run.tree():
            process.send_signal(signal.SIGTERM)
    assert run.end() == 75, run.log.read_text()
    check_interrupted(run, folder, "SIGTERM")


@outcome(
    "A signal before training begins",
    "all processes end at once, exit code 128 + signal; nothing was to be saved",
)
def test_before_training_a_signal_ends_the_tree(inputs, tmp_path):
    run = on_two_processes(tmp_path, "log", inputs)
    run.wait_for(lambda: len(run.workers()) == 2)
    run.process.send_signal(signal.SIGUSR1)
    assert run.end(limit_s=30) == 128 + signal.SIGUSR1, run.log.read_text()
    assert not (tmp_path / "run" / "INTERRUPTED").exists()


def test_one_process_below_two_launchers(inputs, tmp_path):
    folder = tmp_path / "run"
    command = (sys.executable, "-m", "qwen3_sft.cli", "train", *inputs, "--output_dir", folder)
    run = Run(tmp_path, "log", command)
    run.wait_for(trains(folder))
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == 75, run.log.read_text()
    check_interrupted(run, folder, "SIGTERM")


@outcome("A signal where torchrun may restart (`MAX_RESTARTS`)", "exit code 75, no restart")
def test_a_node_is_not_restarted(inputs, tmp_path):
    """With the signal sent to torchrun and all others as well."""
    folder = tmp_path / "run"
    command = (sys.executable, "-m", "qwen3_sft.launch.multinode", *inputs, *GLOO,
               "--output_dir", folder)  # fmt: skip
    variables = {
        "NNODES": "1", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "NPROC_PER_NODE": "2",
        "MASTER_PORT": str(free_port()), "MAX_RESTARTS": "1", "RDZV_ID": "interruption",
    }  # fmt: skip
    run = Run(tmp_path, "log", command, **variables)
    run.wait_for(trains(folder))
    for process in run.tree():
        process.send_signal(signal.SIGUSR1)
    assert run.end() == 75, run.log.read_text()
    assert "resuming" not in run.log.read_text()
    check_interrupted(run, folder, "SIGUSR1")


def test_plain_torchrun_does_not_restart(inputs, tmp_path):
    folder = tmp_path / "run"
    command = (
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2, "--max-restarts", 1,
        "--master-port", free_port(), "-m", "qwen3_sft.train", *inputs, *GLOO, "--output_dir",
        folder,
    )  # fmt: skip
    run = Run(tmp_path, "log", command)
    run.wait_for(trains(folder))
    run.workers()[0].send_signal(signal.SIGTERM)
    assert run.end() == 0, run.log.read_text()
    assert "resuming" not in run.log.read_text()
    check_interrupted(run, folder, "SIGTERM")

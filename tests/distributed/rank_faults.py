"""Start a run of two ranks and hurt one of them, for real; for any test that needs a hurt run."""

from __future__ import annotations

import inspect
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil

from qwen3_sft.demo.model import train_tokenizer
from tests.support.commands import ROOT
from tests.support.run_inputs import write_inputs

WORKER = "tests.distributed.rank_faults_worker"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ACCELERATE = (
    sys.executable, "-m", "accelerate.commands.launch", "--config_file", "config/ddp.json",
    "--num_processes", "2", "--main_process_port", "0",
)  # fmt: skip


class HurtRun:
    """A run that goes on until it is hurt, and everything that it prints.

    Attributes:
        folder: the run folder.
        process: the launcher's.
    """

    def __init__(self, process: subprocess.Popen, root: Path) -> None:
        """Remember where things are.

        Args:
            process: the launcher's.
            root: what `start` was given.
        """
        self.process, self._root = process, root
        self.folder = root / "run"

    def text(self) -> str:
        """Return what all ranks and the launcher have printed."""
        return (self._root / "output").read_text(errors="replace")

    def steps(self) -> int:
        """Return how many steps are recorded."""
        file = self.folder / "metrics.jsonl"
        return len(file.read_text().splitlines()) if file.is_file() else 0

    def wait_for_step(self, step: int, timeout_s: float = 240) -> None:
        """Wait until a step is recorded; fail with everything printed if the run ends first."""
        _wait_until(lambda: self.steps() >= step or self.process.poll() is not None, timeout_s)
        assert self.process.poll() is None, self.text()[-8000:]
        assert self.steps() >= step, self.text()[-8000:]

    def rank(self, rank: int) -> psutil.Process:
        """Return the process of a rank."""
        for child in psutil.Process(self.process.pid).children(recursive=True):
            environ = child.environ()
            if environ.get("RANK") == str(rank) and WORKER in child.cmdline():
                return child
        raise AssertionError(f"no rank {rank}\n{self.text()[-8000:]}")

    def kill(self, rank: int) -> None:
        """End a rank as the out-of-memory killer does."""
        self.rank(rank).send_signal(signal.SIGKILL)

    def stop(self, rank: int) -> None:
        """Stop a rank; it does not notice, and its connections stay open."""
        self.rank(rank).send_signal(signal.SIGSTOP)

    def spoil_data(self, rank: int) -> None:
        """Overwrite the token cache that this rank alone reads: its next batch is an exception."""
        (file,) = (self._root / f"cache_{rank}").glob("*/ids.npy")
        ids = np.load(file, mmap_mode="r+")
        ids[:] = 2**30
        ids.flush()

    def end(self, timeout_s: float) -> tuple[int, float]:
        """Return the launcher's exit code and the seconds until all processes were gone."""
        processes = [psutil.Process(self.process.pid)]
        processes += processes[0].children(recursive=True)
        began = time.monotonic()
        code = self.process.wait(timeout=timeout_s)
        psutil.wait_procs(processes, timeout=max(timeout_s - (time.monotonic() - began), 0.1))
        left = [process for process in processes if process.is_running()]
        assert not left, f"{left}\n{self.text()[-8000:]}"
        return code, time.monotonic() - began


@contextmanager
def start(
    root: Path, *options: object, launcher: Sequence[str] = TORCHRUN, **variables: str
) -> Iterator[HurtRun]:
    """Start two ranks of the tiny model; whatever is left of them is killed at the end.

    Args:
        root: an empty folder, for inputs and outputs.
        *options: of the run.
        launcher: the command before `-m MODULE`.
        **variables: environment variables, see tests/distributed/rank_faults_worker.py.
    """
    tokenizer = train_tokenizer([inspect.getsource(textwrap), inspect.getsource(random)], 1024)
    words = [
        *launcher, "-m", WORKER, *write_inputs(root, tokenizer), "--data_cache_dir",
        root / "cache_{RANK}", "--output_dir", root / "run", "--max_length", 64,
        "--global_batch_size", 8, "--num_samples", 0, "--use_cpu", "true", "--ddp_backend", "gloo",
        "--save_strategy", "no", "--num_train_epochs", 100_000, *options,
    ]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    with (root / "output").open("w") as output:
        process = subprocess.Popen(
            [str(word) for word in words], cwd=ROOT, env=env, stdout=output, stderr=output
        )
    everybody = psutil.Process(process.pid)
    try:
        yield HurtRun(process, root)
    finally:
        if process.poll() is None:
            for child in [*everybody.children(recursive=True), everybody]:
                child.kill()
            process.wait()


def _wait_until(condition: Callable[[], bool], timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.2)

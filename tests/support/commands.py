"""Start the project's commands as a user would, wait for them, read what a run left behind."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*command: object, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """Run a command with one thread per process; never raises."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [str(word) for word in command], cwd=cwd, env=env, capture_output=True, text=True,
        timeout=600,
    )  # fmt: skip


def free_port() -> int:
    """Return a port below those that the system gives to outgoing connections in the meantime."""
    while True:
        port = random.SystemRandom().randrange(12_000, 32_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port


def cli(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    """Run `qwen3-sft ARGUMENTS`."""
    return run(sys.executable, "-m", "qwen3_sft.cli", *arguments, **environment)


def succeeds(result: subprocess.CompletedProcess) -> str:
    """Return standard output, or fail the test with everything that was printed."""
    if result.returncode:
        pytest.fail(f"exit code {result.returncode}\n{result.stdout}\n{result.stderr}")
    return result.stdout


def metrics(folder: Path) -> list[dict]:
    """Return the records of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def wait_until(condition: Callable[[], bool], timeout_s: float = 10) -> None:
    """Wait until a condition holds; fail after `timeout_s` seconds."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "in vain"
        time.sleep(0.005)

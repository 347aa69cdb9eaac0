"""Processes that tokenise end with their parent, without a word of their own."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest

from tests.support.commands import wait_until
from tests.support.source_tree import ROOT


def group(leader: int) -> list[psutil.Process]:
    """What runs of a process group."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_ends_them_all(times):
    """A terminal sends it to every process; a launcher passes it on once more."""
    command = [sys.executable, "-m", "tests.data.interrupted_workers"]
    with subprocess.Popen(
        command, cwd=ROOT, start_new_session=True, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as program:  # fmt: skip
        try:
            assert program.stdout.readline() == "at work\n"
            for _ in range(times):
                os.killpg(program.pid, signal.SIGINT)
                time.sleep(0.02)
            rest, _ = program.communicate(timeout=60)
        finally:
            if program.poll() is None:
                os.killpg(program.pid, signal.SIGKILL)
    assert program.returncode in (130, -signal.SIGINT)
    assert rest in ("stopped by Ctrl-C\n", "")
    wait_until(lambda: not group(program.pid))

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qwen3_sft.distributed.peer_process import ProcessId, State, process_id
from tests.support.commands import wait_until


def test_state_of_a_process(child):
    process = process_id(child.pid)
    assert process.state() is State.ALIVE
    child.send_signal(signal.SIGSTOP)
    wait_until(lambda: process.state() is State.STOPPED)
    child.send_signal(signal.SIGCONT)
    wait_until(lambda: process.state() is State.ALIVE)
    child.kill()
    wait_until(lambda: process.state() is State.GONE)  # a zombie, until it is waited for
    assert os.path.exists(f"/proc/{child.pid}")
    child.wait()
    assert process.state() is State.GONE
    with pytest.raises(ProcessLookupError, match=str(child.pid)):
        process_id(child.pid)


def test_number_that_another_process_has_by_now(child):
    process = process_id(child.pid)
    former = ProcessId(process.pid, process.start - 1)
    assert former.state() is State.GONE
    former.kill()
    time.sleep(0.05)
    assert process.state() is State.ALIVE
    process.kill()
    child.wait(timeout=5)
    process.kill()


def test_traced_process_is_alive():
    """As under a debugger: PTRACE_TRACEME, then a stop that its tracer sees."""
    code = (
        "import ctypes, os, signal; "
        "ctypes.CDLL(None).ptrace(0, 0, 0, 0); os.kill(os.getpid(), signal.SIGSTOP)"
    )
    traced = subprocess.Popen([sys.executable, "-c", code])
    process = process_id(traced.pid)

    def letter():
        return Path(f"/proc/{traced.pid}/stat").read_text().rpartition(")")[2].split()[0]

    wait_until(lambda: letter() == "t")
    assert process.state() is State.ALIVE
    traced.kill()
    traced.wait()


def test_process_whose_name_holds_brackets(tmp_path):
    odd = tmp_path / "a) T 1 (b"
    odd.write_text("#!/bin/sh\nsleep 600\n")
    odd.chmod(0o755)
    started = subprocess.Popen([odd])
    wait_until(lambda: "T 1" in Path(f"/proc/{started.pid}/stat").read_text())
    assert process_id(started.pid).state() is State.ALIVE
    started.kill()
    started.wait()

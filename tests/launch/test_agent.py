"""A launcher's signals: which processes get them, who is waited for, and the exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import psutil
import pytest

from qwen3_sft.errors import INTERRUPTED
from qwen3_sft.launch.agent import (
    ALLOCATOR,
    SHUTDOWN_TIMEOUT,
    WORKER,
    Agent,
    catches,
    reported_code,
    with_defaults,
    workers,
)

# Programs without imports that take long. A worker is known by the name in its command line.
TRAINS = """
import os, signal, sys, time
got = []
signal.signal(signal.SIGTERM, lambda *a: got.append('TERM'))
signal.signal(signal.SIGUSR1, lambda *a: got.append('USR1'))
open(sys.argv[2], 'w').close()
while not got:
    time.sleep(0.02)
time.sleep(0.5)  # the save
open(sys.argv[2], 'w').write(' '.join(got))
if len(sys.argv) > 4:
    open(sys.argv[3], 'w').write(sys.argv[4])
sys.exit(int(sys.argv[4]) if len(sys.argv) > 4 else 1)
"""
LOADS = "import sys, time; open(sys.argv[2], 'w').close(); time.sleep(600)"
# As accelerate's launcher of one process: every failure is 1, and a signal ends only itself.
STARTS = """
import subprocess, sys
sys.exit(min(subprocess.run([sys.executable, '-c', *sys.argv[1:]]).returncode, 1))
"""


def launch(tmp_path, program, *numbers, code=None, delay_s=0.0, to_agent=None):
    """Start an agent with one worker, send the signals once the worker is up.

    Returns the exit code and what the worker wrote about signals.
    """
    ready, exit_file = tmp_path / "ready", tmp_path / "exit_code"
    command = [sys.executable, "-c", STARTS, program, "qwen3_sft.train", str(ready), str(exit_file)]
    command += [] if code is None else [str(code)]
    with Agent(command, dict(os.environ)) as agent:

        def send():
            while not ready.is_file():
                time.sleep(0.01)
            if to_agent is not None:
                time.sleep(0.2)  # it was looked at meanwhile
                os.kill(agent.process.pid, to_agent)
            for number in numbers:
                os.kill(os.getpid(), number)
                time.sleep(delay_s)

        thread = threading.Thread(target=send)
        thread.start()
        while agent.poll() is None:
            agent.has_workers()
            agent.wait(0.05)
        thread.join()
    left = [p for p in psutil.process_iter(["cmdline"]) if str(ready) in (p.info["cmdline"] or [])]
    assert left == [], "an orphan stayed behind"
    (tmp_path / "agent").write_text(str(agent.process.returncode))
    return agent.exit_code(reported_code(exit_file)), ready.read_text()


def test_a_handler_is_seen_from_outside():
    here = psutil.Process()
    before = signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    try:
        assert not catches(here, signal.SIGUSR1)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        assert not catches(here, signal.SIGUSR1)
        signal.signal(signal.SIGUSR1, lambda *_: None)
        assert catches(here, signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_what_has_ended_is_no_worker_and_catches_nothing():
    child = subprocess.Popen([sys.executable, "-c", "", "qwen3_sft.train"])
    process = psutil.Process(child.pid)
    while process.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert child.pid not in {worker.pid for worker in workers(os.getpid())}
    child.wait()
    assert workers(child.pid) == []
    assert not catches(process, signal.SIGUSR1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_worker_that_trains_is_asked_to_save(tmp_path, number):
    name = "TERM" if number == signal.SIGTERM else "USR1"
    assert launch(tmp_path, TRAINS, number, code=INTERRUPTED) == (INTERRUPTED, name)


def test_a_second_signal_changes_nothing(tmp_path):
    result = launch(
        tmp_path, TRAINS, signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, code=INTERRUPTED,
        delay_s=0.1,
    )  # fmt: skip
    assert result == (INTERRUPTED, "TERM")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_worker_that_does_not_train_yet_is_ended(tmp_path, number):
    assert launch(tmp_path, LOADS, number) == (128 + number, "")


@pytest.fixture
def hears_ctrl_c():
    """What is started here does, even if this is a shell's background job."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_ends_a_worker_that_trains(hears_ctrl_c, tmp_path):
    """It keeps Python's handler of SIGINT."""
    assert launch(tmp_path, TRAINS, signal.SIGINT) == (128 + signal.SIGINT, "")


def test_a_failed_save_keeps_its_code(tmp_path):
    assert launch(tmp_path, TRAINS, signal.SIGTERM, code=1)[0] == 1


def test_a_worker_that_outlives_its_agent_is_waited_for(tmp_path, monkeypatch):
    """A scheduler may signal every process. Only what does not save has a limit."""
    monkeypatch.setattr("qwen3_sft.launch.agent._KILL_AFTER_S", 0.1)
    result = launch(tmp_path, TRAINS, signal.SIGTERM, code=INTERRUPTED, to_agent=signal.SIGTERM)
    assert result[0] == INTERRUPTED


@pytest.mark.parametrize(("program", "code"), [(LOADS, 1), (TRAINS, INTERRUPTED)])
def test_a_killed_agent_leaves_no_orphan(tmp_path, program, code):
    result = launch(tmp_path, program, code=INTERRUPTED, to_agent=signal.SIGKILL)
    assert result[0] == code


def test_the_agent_ignores_sigusr1(tmp_path):
    """It knows nothing of it and would end."""
    result = launch(tmp_path, TRAINS, signal.SIGUSR1, code=INTERRUPTED, to_agent=signal.SIGUSR1)
    assert result == (INTERRUPTED, "USR1")
    assert (tmp_path / "agent").read_text() == "1"


def test_handlers_of_the_launcher_are_put_back():
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    with suppress(ZeroDivisionError), Agent([sys.executable, "-c", ""], dict(os.environ)):
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_run_of_one_process_is_agent_and_worker(tmp_path, monkeypatch):
    """Without accelerate's launcher in between each signal comes once."""
    package, ready = tmp_path / "qwen3_sft", tmp_path / "ready"
    package.mkdir()
    program = TRAINS.replace("sys.argv[2]", "sys.argv[1]").replace("sys.argv[4]", "sys.argv[2]")
    (package / "train.py").write_text(program.replace("> 4", "> 3"))
    (package / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)  # where Python looks for modules first
    with Agent([sys.executable, *WORKER, str(ready)], dict(os.environ)) as agent:
        while not ready.is_file():
            assert agent.poll() is None
            time.sleep(0.01)
        assert [worker.pid for worker in workers(agent.process.pid)] == [agent.process.pid]
        os.kill(os.getpid(), signal.SIGUSR1)
        while agent.poll() is None:
            agent.has_workers()
            agent.wait(0.05)
    assert ready.read_text() == "USR1"
    assert agent.exit_code(INTERRUPTED) == INTERRUPTED


def test_the_allocator_is_set_unless_somebody_has():
    assert with_defaults({"A": "1"}) == {"A": "1", **dict([SHUTDOWN_TIMEOUT, ALLOCATOR])}
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        chosen = {name: "max_split_size_mb:128"}
        assert with_defaults(chosen) == {**chosen, **dict([SHUTDOWN_TIMEOUT])}

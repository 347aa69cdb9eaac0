"""Processes that tokenise: results in order, and a death is an error within seconds."""

from __future__ import annotations

import gc
import os
import pickle
import resource
import signal
import struct
import sys
import time
from multiprocessing.connection import Connection

import psutil
import pytest

from qwen3_sft.chat.encoding import Encoder
from qwen3_sft.data.prepare import tokenize_options
from qwen3_sft.data.tokenize_rows import RowPacker
from qwen3_sft.data.workers import map_in_workers
from qwen3_sft.errors import DataError, WorkerError
from qwen3_sft.options.data_args import DataArguments

PAYLOAD = b"x" * (4 << 20)  # more than a pipe takes up, as a tokenizer is


class Task:
    """What the workers run: a task is a number, or the name of a fault."""

    def __init__(self) -> None:
        self.payload = PAYLOAD

    def __call__(self, task: int | str) -> tuple[int, bytes]:
        if task == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if task == "exits":
            os._exit(7)
        if task == "half a result":
            gc.unfreeze()  # what was there before the work is not listed
            pipe = next(o for o in gc.get_objects() if isinstance(o, Connection))
            os.write(pipe.fileno(), struct.pack("!i", 1000) + b"x" * 10)
            os._exit(7)
        if task == "refused":
            raise DataError("earlier")
        if task == "raises":
            raise LookupError("unforeseen")
        return int(task), self.payload


def children() -> list[psutil.Process]:
    return [
        process
        for process in psutil.Process().children()
        if "qwen3_sft.data.workers" in " ".join(process.cmdline())
    ]


class Unreadable(Task):
    """As of an import that fails where the worker unpickles."""

    def __setstate__(self, state: object) -> None:
        raise ImportError("no module named that")


def within(seconds: float, function, tasks, num_proc=2) -> WorkerError:
    """Return the error; fail, with all processes ended, if none comes in time."""

    def expired(*_):
        raise TimeoutError

    previous = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        with pytest.raises(WorkerError) as caught:
            list(map_in_workers(function, tasks, num_proc))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    return caught.value


def test_results_come_in_order_and_no_process_stays():
    results = map_in_workers(Task(), range(20), 3)
    assert [number for number, _ in results] == list(range(20))
    assert not children()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("killed", r"\(pid \d+\) was ended by signal 9 \(Killed\); .*memory .*lower --num_proc"),
        ("exits", r"\(pid \d+\) ended with exit code 7"),
        ("half a result", r"\(pid \d+\) ended with exit code 7"),
    ],
)
def test_death_in_mid_work(fault, message):
    error = within(20, Task(), [0, 1, 2, 3, fault, *range(50)])
    assert error.exit_code == 1
    assert pytest.raises(WorkerError, match=message).matches(error)
    assert not children()


def test_an_import_that_fails_in_the_worker(capfd):
    assert "ended with exit code 1" in str(within(20, Unreadable(), range(50)))
    assert "no module named that" in capfd.readouterr().err


def test_death_before_the_worker_has_read_its_arguments(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert "ended with exit code 1" in str(within(10, Task(), range(50)))


def test_an_error_of_a_task_comes_after_those_before_it():
    def tasks():
        yield from [0, "refused", 1]
        raise DataError("later")

    with pytest.raises(DataError, match="earlier"):
        list(map_in_workers(Task(), tasks(), 2))
    with pytest.raises(DataError, match="later"):
        list(map_in_workers(Task(), (task for task in tasks() if task != "refused"), 2))


def test_a_worker_imports_what_it_needs_and_no_more(tokenizer):
    """Not the program that starts it, pytest here; neither torch nor transformers."""
    args = DataArguments(dataset=["data.jsonl"])
    sent = pickle.dumps(RowPacker(Encoder(tokenizer), tokenize_options(args, tokenizer)))
    task = f"[__import__('pickle').loads({sent!r}), set(__import__('sys').modules)][1]"
    (found,) = map_in_workers(eval, [task], 1)
    assert "qwen3_sft.data.tokenize_rows" in found
    assert not found & {"pytest", "torch", "transformers", "datasets", "pyarrow", "huggingface_hub"}


def test_death_between_tasks():
    tasks = iter(range(50))

    def slow_tasks():
        yield from (next(tasks) for _ in range(5))
        time.sleep(1)
        for child in children():
            child.kill()
        yield from tasks

    assert "signal 9" in str(within(20, Task(), slow_tasks()))


def test_an_unforeseen_error_is_printed_with_its_place(capfd):
    assert "ended with exit code 1" in str(within(20, Task(), [0, "raises", 1], 1))
    printed = capfd.readouterr().err
    assert "test_workers.py" in printed
    assert "LookupError: unforeseen" in printed


def test_leaving_early_ends_the_processes():
    results = map_in_workers(Task(), range(1000), 2)
    assert next(results)[0] == 0
    assert len(children()) == 2
    results.close()
    assert not children()


def test_a_process_that_cannot_be_started():
    lowest_free = os.open("/dev/null", os.O_RDONLY)
    os.close(lowest_free)
    _, hard = limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        with pytest.raises(WorkerError, match=r"cannot start .*Too many open files; lower --num"):
            list(map_in_workers(Task(), range(5), 2))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert not children()

"""A pool of processes in which the death of one is an error, and never a wait.

`concurrent.futures` waits for ever for a process that dies before it has read its arguments, or
while it writes a result: the parent holds both ends of the pipes that all of them share. Here each
process has a connection of its own whose other end is closed in the parent, so that its death ends
every read and write; a thread for each process keeps one task at a time on its way.

A process of `multiprocessing` imports the program that starts it, torch and all (10 s and 650 MB
for `qwen3_sft.train`). One of these is a Python that imports what its function needs.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, TypeVar

from qwen3_sft.errors import SftError, WorkerError

Task = TypeVar("Task")
Result = TypeVar("Result")

_NEW_OBJECTS = 100_000  # between two searches for garbage: some megabytes
_EXIT_S = 5.0  # from the end of a connection to the exit code
_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from qwen3_sft.data.workers import serve; serve(int(sys.argv[2]))"
)
# The processes use all cores already, and libraries keep memory for each of their threads.
_ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}


def map_in_workers(
    function: Callable[[Task], Result], tasks: Iterable[Task], num_proc: int
) -> Generator[Result]:
    """Yield `function(task)` of each task, in order, computed by `num_proc` processes.

    Args:
        function: sent to each process once.
        tasks: read no further ahead than keeps all processes busy.
        num_proc: processes, started anew: a fork of a process with threads, as `tokenizers` and
            torch have, may deadlock.

    Raises:
        WorkerError: a process cannot be started, or ended before its work.
        SftError: what `function`, or reading a task, raises, the first in the order of the tasks.
            Another error of `function` is printed by its process, which ends.
    """
    sent = pickle.dumps(function)
    workers: list[_Worker] = []
    idle: SimpleQueue[_Worker] = SimpleQueue()

    def work(task: Task) -> Result:
        worker = idle.get()
        try:
            return worker(task)
        finally:
            idle.put(worker)

    threads = ThreadPoolExecutor(num_proc, "data-worker")
    waiting: deque[Future[Result]] = deque()
    try:
        failure = None
        remaining = iter(tasks)
        while True:
            try:
                task = next(remaining)
            except StopIteration:
                break
            except SftError as error:  # of a later task than those on their way
                failure = error
                break
            if len(workers) < num_proc:
                workers.append(_Worker(sent))
                idle.put(workers[-1])
            waiting.append(threads.submit(work, task))
            if len(waiting) > 2 * num_proc:  # reading ahead further would only cost memory
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
        if failure is not None:
            raise failure
    finally:
        for worker in workers:
            worker.process.kill()  # it holds nothing; a thread that waits for it goes on
        threads.shutdown(cancel_futures=True)
        for worker in workers:
            worker.close()


class _Worker:
    """A process of the pool, used by one thread at a time."""

    def __init__(self, sent: bytes) -> None:
        self._function: bytes | None = sent
        try:
            self._connection, theirs = multiprocessing.Pipe()
            descriptor = theirs.fileno()
            command = [sys.executable, "-P", "-c", _PROGRAM, json.dumps(sys.path), str(descriptor)]
            with theirs, _deaf_to_ctrl_c():
                self.process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, pass_fds=[descriptor],
                    env={**os.environ, **_ENVIRONMENT},
                )  # fmt: skip
        except OSError as error:
            raise WorkerError(
                f"cannot start a process that tokenises: {error.strerror}; lower --num_proc"
            ) from error

    def __call__(self, task: Any) -> Any:
        """Return the result of a task, or raise what it raised."""
        try:
            if self._function is not None:
                self._connection.send_bytes(self._function)
                self._function = None
            self._connection.send(task)
            is_done, result = self._connection.recv()
        except (EOFError, OSError) as error:
            raise WorkerError(self._end()) from error
        if is_done:
            return result
        raise result

    def _end(self) -> str:
        """Return how the process came to its end."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(_EXIT_S)
        code = self.process.returncode
        what = f"a process that tokenises (pid {self.process.pid})"
        if code is not None and code < 0:
            return (
                f"{what} was ended by signal {-code} ({signal.strsignal(-code)}); if the machine "
                "ran out of memory (see `dmesg`), lower --num_proc"
            )
        return f"{what} ended with exit code {code}; what it printed says why, or try --num_proc 1"

    def close(self) -> None:
        """Take back the process, which was killed."""
        self.process.wait()
        self._connection.close()


@contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """Start no process that hears it: the parent does, and ends its processes without a word."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def serve(descriptor: int) -> None:
    """Run tasks until the parent ends; what was not foreseen ends this process and is printed.

    Args:
        descriptor: of the connection to the parent.
    """
    connection = Connection(descriptor)
    function = _received(connection)
    with few_collections():
        while True:
            connection.send(_outcome(function, _received(connection)))


@contextmanager
def few_collections() -> Iterator[None]:
    """Search for cyclic garbage rarely, and not among what is there now.

    Rows become many small objects that live for a chunk and have no cycles: looking through them,
    and through a vocabulary, takes half the time of parsing and rendering.
    """
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(_NEW_OBJECTS, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def _received(connection: Connection) -> Any:
    try:
        return connection.recv()
    except (EOFError, OSError):
        raise SystemExit from None  # the parent is gone, and nobody waits for a result


def _outcome(function: Callable[[Any], Any], task: Any) -> tuple[bool, Any]:
    """Return (True, result), or (False, error)."""
    try:
        return True, function(task)
    except SftError as error:
        return False, error

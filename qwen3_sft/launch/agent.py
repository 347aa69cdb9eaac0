"""A launcher and its worker processes: how signals reach them, and what their end is called.

The launchers in between cannot be asked to stop a run: torchrun answers SIGTERM by killing its
workers after a limit, accelerate's launcher of one process ends and leaves its child behind, and
SIGUSR1 kills either (torch 2.13, accelerate 1.15). So our launcher signals the workers itself, and
waits for as long as a checkpoint takes: it is written aside, and whoever kills it loses only that.
"""

from __future__ import annotations

import logging
import re
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType

import psutil

from qwen3_sft.errors import BY_SIGNAL, DONE, FAILED, INTERRUPTED, SIGNALS

logger = logging.getLogger(__name__)

# Of a worker's command line, behind the interpreter.
WORKER = ("-m", "qwen3_sft.train")
_KILL_AFTER_S = 5.0
_POLL_S = 0.05
# For the case that torchrun is signalled as well: it would kill its workers after 30 s. A worker
# that hangs ends at --dist_timeout_s, 1800 s by default.
SHUTDOWN_TIMEOUT = ("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "1800")
# Without it a run that fills a GPU loses GiB to free blocks that are too short, as rows of logits
# and slices of updates come and go. Under both names: torch still reads the older one.
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "expandable_segments:True")
_ALLOCATOR_NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def with_defaults(environment: dict[str, str]) -> dict[str, str]:
    """Return an environment with what a run's processes want, as far as nobody has set it."""
    chosen = any(name in environment for name in _ALLOCATOR_NAMES)
    return dict([SHUTDOWN_TIMEOUT] if chosen else [SHUTDOWN_TIMEOUT, ALLOCATOR]) | environment


def workers(agent: int) -> list[psutil.Process]:
    """Return the training processes that run: those an agent (its id) has started, or itself."""
    try:
        process = psutil.Process(agent)
        if _runs(process) and tuple(process.cmdline()[1:3]) == WORKER:
            return [process]
        return [p for p in process.children() if _runs(p) and WORKER[1] in p.cmdline()]
    except psutil.Error:  # ended while it was looked at
        return []


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def catches(process: psutil.Process, number: int) -> bool:
    """Whether a process has a handler of its own for a signal, which a worker has in training."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
    except OSError:  # ended while it was looked at
        return False
    caught = re.search(r"^SigCgt:\s*([0-9a-f]+)", status, re.MULTILINE)
    return caught is not None and bool(int(caught[1], 16) >> (number - 1) & 1)


def _trains(process: psutil.Process) -> bool:
    return _runs(process) and catches(process, signal.SIGUSR1)


class Agent:
    """accelerate's or torchrun's process; signals to this process are passed on to its workers.

    A run of one process needs neither: then the agent is the worker.

    SIGTERM and SIGUSR1 ask workers that train to save and end. Before and after training there is
    nothing to save: the whole tree is terminated. SIGINT goes to the agent, which ends its workers.
    """

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        """Name what to start; it is started by `with`, from the main thread."""
        self._command, self._environment = command, environment
        self.signals: list[signal.Signals] = []
        self._new: list[signal.Signals] = []
        self._asked: set[psutil.Process] = set()
        self._below: set[psutil.Process] = set()  # workers and whatever else was signalled

    def __enter__(self) -> Agent:
        """Start it."""
        # Inherited over exec: a signal to the whole session must not end the agent.
        former_usr1 = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        self.process = subprocess.Popen(self._command, env=with_defaults(self._environment))
        self._former = {n: signal.signal(n, self._receive) for n in (*SIGNALS, signal.SIGINT)}
        self._former[signal.SIGUSR1] = former_usr1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        """Let nothing outlive this but what saves, and wait for that; put the handlers back."""
        try:
            if signal.SIGINT not in self.signals:
                self._ask([w for w in self._left() if _trains(w)], signal.SIGTERM)
                while any(_runs(worker) for worker in self._asked):
                    time.sleep(_POLL_S)
            for process in self._left():
                process.terminate()
            end = time.monotonic() + _KILL_AFTER_S
            while self._left() and time.monotonic() < end:
                time.sleep(_POLL_S)
            for process in self._left():
                process.kill()
        finally:
            for number, handler in self._former.items():
                signal.signal(number, handler)

    def _left(self) -> list[psutil.Process]:
        return [process for process in self._below if _runs(process)]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._new.append(signal.Signals(number))

    def has_workers(self) -> bool:
        """Whether a worker runs; those seen here are waited for even if the agent ends first."""
        found = workers(self.process.pid)
        self._below |= set(found)
        return bool(found)

    def poll(self) -> int | None:
        """Pass new signals on; return the agent's exit code, None while it runs."""
        while self._new:
            number = self._new.pop(0)
            self.signals.append(number)
            if number not in SIGNALS:
                self._end(number)
            elif not any(_runs(worker) for worker in self._asked):
                self.has_workers()
                training = [worker for worker in self._left() if _trains(worker)]
                if training:
                    logger.warning("%s: %d processes save and end", number.name, len(training))
                    self._ask(training, number)
                else:
                    self._end(signal.SIGTERM)
        return self.process.poll()

    def wait(self, limit_s: float) -> None:
        """Wait for the agent's end or a signal, but not for longer than `limit_s` seconds."""
        end = time.monotonic() + limit_s
        while not self._new and self.process.poll() is None and time.monotonic() < end:
            time.sleep(_POLL_S)

    def _ask(self, training: list[psutil.Process], number: signal.Signals) -> None:
        self._asked |= set(training)
        for worker in training:
            worker.send_signal(number)

    def _end(self, number: signal.Signals) -> None:
        """Signal the agent and all below it, and remember who has to be gone in the end."""
        with suppress(psutil.NoSuchProcess):
            self._below |= set(psutil.Process(self.process.pid).children(recursive=True))
        self.process.send_signal(number)
        for process in self._left():
            if process.pid != self.process.pid:
                process.send_signal(number)

    def exit_code(self, reported: int | None) -> int:
        """Return the launcher's exit code once the agent has ended.

        Args:
            reported: what a worker said of its end (`reported_code`), which the agent turns into 1.
        """
        if reported == INTERRUPTED:
            return INTERRUPTED
        if self.process.returncode == DONE:
            return DONE
        # Where several processes are ended, some complain that others are gone.
        if self.signals and not (self._asked and reported):
            return BY_SIGNAL + self.signals[0]
        # One process may have succeeded and said so before another one failed.
        return reported or FAILED


def reported_code(exit_file: Path) -> int | None:
    """The code that a process of this node wrote last; None where all ended without one."""
    text = exit_file.read_text(encoding="utf-8") if exit_file.is_file() else ""
    return int(text) if text else None

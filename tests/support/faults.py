"""Training processes that are hurt for real, and the table of what each fault ends in.

A process is forked from a server that has everything imported (a start costs a second, not ten),
trains as `python -m qwen3_sft.train` would, and is killed, starved or signalled from outside, or at
a chosen file operation by an audit hook of its own.

    python -m tests.support.faults     writes the table into docs/troubleshooting.md
"""

from __future__ import annotations

import importlib
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tests.support import forked
from tests.support.commands import ROOT, metrics

DOCUMENT = ROOT / "docs" / "troubleshooting.md"
BEGIN, END = "<!-- faults: written by python -m tests.support.faults -->", "<!-- end of faults -->"
# Whoever injects a fault says so with `outcome`; their order is the table's.
MODULES = (
    "tests.e2e.test_faults", "tests.e2e.test_interruption_faults", "tests.e2e.test_faulty_options",
    "tests.distributed.test_peers_faults", "tests.distributed.test_save_faults",
    "tests.training.test_trainer", "tests.checkpoints.test_folders",
    "tests.training.test_reporters", "tests.house.test_security",
)  # fmt: skip

Test = TypeVar("Test", bound=Callable[..., Any])
_outcomes: list[tuple[str, str, str]] = []


def outcome(fault: str, text: str) -> Callable[[Test], Test]:
    """Declare what a test proves: a row of the table.

    Args:
        fault: what happens to a run.
        text: what the run does, and what is to be done.
    """

    def note(test: Test) -> Test:
        _outcomes.append((fault, text, f"{test.__module__.rpartition('.')[2]}.{test.__name__}"))
        return test

    return note


def table() -> str:
    """Return the rows of all `MODULES` in markdown."""
    _outcomes.clear()
    for name in MODULES:
        sys.modules.pop(name, None)
        importlib.import_module(name)
    rows = [f"| {fault} | {text} | `{test}` |" for fault, text, test in _outcomes]
    return "\n".join(["| Fault | Outcome | Test |", "|---|---|---|", *rows])


def documented(text: str) -> str:
    """Return the document with the table in its place."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{table()}\n{END}{tail}"


# ---- processes ----


@dataclass(frozen=True)
class Blow:
    """A SIGKILL that a process deals itself at a file operation in a folder.

    Attributes:
        folder: operations on other files do not count.
        after: count operations once this path exists, such as the checkpoint before.
        at: number of the operation (an audit event of Python: open, rename, remove, ...) that is
            not done any more; None only counts them.
        max_bytes: end instead in the middle of the write that makes a file larger than this.
    """

    folder: Path
    after: Path
    at: int | None = None
    max_bytes: int | None = None
    _EVENTS = frozenset({"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"})

    def arm(self, count_file: Path) -> None:
        """Begin to listen, in the process itself; the operations are written to `count_file`."""
        state = {"seen": 0, "busy": False}

        def hook(event: str, args: tuple) -> None:
            if event not in self._EVENTS or state["busy"]:
                return
            path = str(args[0])
            if not path.startswith(str(self.folder)):
                return
            state["busy"] = True
            if self.after.exists():
                state["seen"] += 1
                with count_file.open("a") as file:
                    file.write(f"{event} {path}\n")
                if state["seen"] == self.at:
                    os.kill(os.getpid(), signal.SIGKILL)
                if self.max_bytes is not None:
                    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
                    limit = (self.max_bytes, resource.RLIM_INFINITY)
                    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
            state["busy"] = False

        sys.addaudithook(hook)


@dataclass
class Victim:
    """One training process.

    Attributes:
        process: it; `exitcode` is negative for a signal.
        log: what it prints.
        output: its run folder.
    """

    process: Any
    log: Path
    output: Path
    operations: Path = field(default=Path())

    @property
    def words(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(encoding="utf-8") if self.log.exists() else ""

    def end(self, timeout_s: float = 120) -> int:
        """Wait for its end; return the exit code."""
        self.process.join(timeout_s)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"still running after {timeout_s} s:\n{self.words[-4000:]}")
        return self.process.exitcode

    def wait_for(self, step: int, timeout_s: float = 120) -> None:
        """Wait until a step is recorded."""
        end = time.monotonic() + timeout_s
        file = self.output / "metrics.jsonl"
        while not (file.exists() and any(r["step"] >= step for r in metrics(self.output))):
            if self.process.exitcode is not None or time.monotonic() > end:
                raise AssertionError(f"step {step} did not come:\n{self.words[-4000:]}")
            time.sleep(0.05)

    def hurt(self, number: signal.Signals) -> None:
        """Send a signal."""
        os.kill(self.process.pid, number)


def start(argv: tuple, output: Path, blow: Blow | None = None, **environment: str) -> Victim:
    """Start `python -m qwen3_sft.train ARGV --output_dir OUTPUT` on the CPU.

    Args:
        argv: options.
        output: the run folder.
        blow: what the process does to itself.
        **environment: variables to set.
    """
    # Beside no run: its disk may be full or read-only.
    notes = Path(tempfile.mkdtemp(prefix="faults-"))
    log, operations = notes / "log", notes / "operations"
    words = [str(word) for word in (*argv, "--output_dir", output, "--use_cpu", "true")]
    process = forked.start(
        _train, words, operations, blow, out=log, err=log, environment={**os.environ, **environment}
    )
    return Victim(process, log, output, operations)


def _train(argv: list[str], operations: Path, blow: Blow | None) -> int:
    from qwen3_sft import train

    if blow is not None:
        blow.arm(operations)
    return train.main(argv)


if __name__ == "__main__":
    from tests.support.faults import documented  # the module that the tests have declared theirs to

    DOCUMENT.write_text(documented(DOCUMENT.read_text("utf-8")), "utf-8")

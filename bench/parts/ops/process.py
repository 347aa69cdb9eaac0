"""A worker of the race seen from outside: asked with a time limit, and allowed to die."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, Any

BENCH = Path(__file__).resolve().parents[2]


class Process:
    """One implementation's process.

    A case that ends the process gets the reason as its answer, and the next case a new process,
    unless the implementation could not even be loaded.

    Args:
        name: what the worker loads.

    Attributes:
        versions: of the implementation's packages, once it is loaded.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.versions: dict[str, str | None] | None = None
        self._failure: dict[str, Any] | None = None
        self._start()

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Return the worker's answer; `status` is `failed` with a `reason` where there is none."""
        deadline = time.monotonic() + seconds
        if self._failure is None and not self._is_loaded:
            ready = self._next(seconds)
            self._is_loaded = ready["status"] == "ready"
            self.versions = ready.get("versions")
            self._failure = None if self._is_loaded else ready
        if self._failure is not None:
            return self._failure
        with contextlib.suppress(BrokenPipeError):  # it died meanwhile; its output ends, too
            self._stdin.write(json.dumps(request) + "\n")
            self._stdin.flush()
        answer = self._next(deadline - time.monotonic())
        if not self._is_loaded:
            self._start()
        return answer

    def close(self) -> None:
        """End the process and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()
        self._is_loaded = False

    def _start(self) -> None:
        self._is_loaded = False
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - the process writes to it
        self._child = subprocess.Popen(
            [sys.executable, "-m", "parts.ops.worker", self.name], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
            env={**os.environ, "PYTHONPATH": _search_path()}, start_new_session=True,
        )  # fmt: skip
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._stdin = self._child.stdin
        self._lines: queue.Queue[str] = queue.Queue()
        reading = (self._child.stdout, self._lines)
        threading.Thread(target=_forward_lines, args=reading, daemon=True).start()

    def _next(self, seconds: float) -> dict[str, Any]:
        """Return the next answer; a process that is dead or silent is closed."""
        try:
            line = self._lines.get(timeout=max(0.0, seconds))
        except queue.Empty:
            self.close()
            return self._failed(f"no answer within {seconds:.0f} s")
        if line:
            answer = json.loads(line)
            if answer["status"] != "ended":
                return answer
            self.close()
            return self._failed(answer["reason"])
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(timeout=5)  # output may end a moment before the process does
        code = self._child.poll()
        self.close()
        return self._failed(f"the process ended with code {code}: {self._last_words()[-1:]}")

    def _failed(self, reason: str) -> dict[str, Any]:
        print(f"--- {self.name}: {reason}", *self._last_words(), sep="\n    ", file=sys.stderr)
        return {"status": "failed", "reason": reason}

    def _last_words(self) -> list[str]:
        self._errors.seek(0)
        return self._errors.read().decode("utf-8", "replace").splitlines()[-15:]


def _search_path() -> str:
    return os.pathsep.join([str(BENCH), *filter(None, [os.environ.get("PYTHONPATH")])])


def _forward_lines(source: IO[str], target: queue.Queue[str]) -> None:
    for line in source:
        target.put(line)
    target.put("")

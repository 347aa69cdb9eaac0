"""Which places are executed: every instruction's position, of the functions that hold places."""

from __future__ import annotations

import sys
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

from tests.fake_gpu.cuda_only import Place


class Tracer:
    """A plugin of pytest that watches tests; what they import on top is not slowed down.

    Attributes:
        executed: places of which an instruction has run.
    """

    def __init__(self, places: Iterable[Place], root: Path) -> None:
        self.executed: set[Place] = set()
        self._places: dict[str, list[Place]] = defaultdict(list)
        for place in places:
            self._places[str(root / place.file)].append(place)
        self._found: dict[CodeType, dict[int, set[Place]]] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self) -> Iterator[None]:
        threading.settrace(self._call)
        sys.settrace(self._call)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            threading.settrace(None)  # type: ignore[arg-type]

    def _call(self, frame: FrameType, event: str, arg: Any) -> Any:
        code = frame.f_code
        if code not in self._found:
            self._found[code] = self._instructions(code)
        if not self._found[code]:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._instruction

    def _instruction(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "opcode":
            self.executed |= self._found[frame.f_code].get(frame.f_lasti, set())
        return self._instruction

    def _instructions(self, code: CodeType) -> dict[int, set[Place]]:
        """Return the places of each instruction of a function that has any."""
        found = {}
        for number, (line, end_line, column, end_column) in enumerate(code.co_positions()):
            if None in (line, end_line, column, end_column):
                continue
            held = {
                place for place in self._places.get(code.co_filename, ())
                if place.holds(line, column, end_line, end_column)
            }  # fmt: skip
            if held:
                found[2 * number] = held
        return found

"""Stretches of a JSON lines file that other processes read for themselves.

Counting lines takes a hundredth of the time of reading what they say, so one process finds the
stretches, with the numbers of their lines and rows, and any process reads one.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qwen3_sft.data.json_rows import BLANK_LINE, Row, is_blank, line_rows
from qwen3_sft.data.tally import Tally

MOST_ROWS = 256
_MOST_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class LineRange:
    """Whole lines of a file.

    Attributes:
        start: offset of the first byte.
        end: offset after the last one.
        first_line: its number, from 1.
        rows: lines that are not blank.
    """

    path: Path
    start: int
    end: int
    first_line: int
    rows: int

    def read(self, *, drop_bad: bool) -> Iterator[Row]:
        """Yield the rows, as `jsonl_rows` does.

        Raises:
            DataError: as `jsonl_rows`.
        """
        with self.path.open("rb") as file:
            file.seek(self.start)
            lines = io.BytesIO(file.read(self.end - self.start))
        yield from line_rows(self.path, lines, self.first_line, Tally(), drop_bad=drop_bad)


def line_ranges(path: Path, skip: int, limit: int | None, tally: Tally) -> Iterator[LineRange]:
    """Yield the stretches of a file.

    Args:
        path: of JSON lines that are not compressed.
        skip: rows at its start that are left out.
        limit: rows to find at most, of those after them.
        tally: counts blank lines among them.
    """
    position, start, first_line, rows = 0, 0, 1, 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if skip:
                skip -= not is_blank(line, number)
                position += len(line)
                start, first_line = position, number + 1
                continue
            if limit == 0:
                break
            position += len(line)
            if is_blank(line, number):
                tally.add(BLANK_LINE, f"{path}:{number}")
                continue
            rows += 1
            limit = None if limit is None else limit - 1
            if rows == MOST_ROWS or position - start >= _MOST_BYTES:
                yield LineRange(path, start, position, first_line, rows)
                start, first_line, rows = position, number + 1, 0
    if rows:
        yield LineRange(path, start, position, first_line, rows)

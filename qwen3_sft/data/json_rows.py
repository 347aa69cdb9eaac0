"""Read rows from JSON and JSON lines files; every error names file, line and column.

A `.json` file may be one array of objects (LongAlpaca: hundreds of megabytes in one array), one
object, objects one after the other, or one object that wraps the array as `{"data": [...]}`. It is
decoded through a window that grows only while an object does not fit, so memory follows the largest
row and not the file. A `.jsonl` file that does not hold one value per line is read in this way too.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

from qwen3_sft.data.files.compressed import open_bytes
from qwen3_sft.data.files.strict_json import StrictDecoder
from qwen3_sft.data.files.wrapped_rows import wrapped_rows
from qwen3_sft.data.tally import Tally
from qwen3_sft.errors import DataError

Row = tuple[str, Any]  # location, and content: a dict, or a `BadRow`

BLANK_LINE = "blank line skipped"
_LINES = StrictDecoder()
_WINDOW = 1 << 20  # bytes read at a time
_WHITESPACE = " \t\n\r"
_TRUNCATION = 16  # a value cut by the window's end fails within its last token: `false`, `\\uABCD`


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be read, where bad rows are dropped."""

    error: DataError


def jsonl_rows(path: Path, tally: Tally, *, drop_bad: bool = False) -> Iterator[Row]:
    """Yield ("file:line", object) for each line that is not blank.

    Args:
        path: of the file, which may be compressed.
        tally: counts blank lines.
        drop_bad: yield a `BadRow` for a line that cannot be read, where it is an error otherwise.

    Raises:
        DataError: on invalid UTF-8, a syntax error, or a line that is not an object.
    """
    if not is_one_per_line(path):
        yield from json_rows(path, drop_bad=drop_bad)
        return
    with open_bytes(path) as file:
        yield from line_rows(path, file, 1, tally, drop_bad=drop_bad)


def line_rows(
    path: Path, lines: Iterable[bytes], first: int, tally: Tally, *, drop_bad: bool
) -> Iterator[Row]:
    """Yield the rows of lines of a file, as `jsonl_rows` does.

    Args:
        path: of the file, for locations.
        lines: bytes with their ends.
        first: number of the first of them.
        tally: counts blank lines.
        drop_bad: as for `jsonl_rows`.

    Raises:
        DataError: as `jsonl_rows`.
    """
    for number, raw in enumerate(lines, first):
        line = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
        location = f"{path}:{number}"
        if is_blank(raw, number):
            tally.add(BLANK_LINE, location)
            continue
        try:
            row = _as_object(_decode_line(line, location), location)
        except DataError as error:
            if not drop_bad:
                raise
            yield location, BadRow(error)
        else:
            yield location, row


def is_blank(line: bytes, number: int) -> bool:
    """Whether a line has no row; the first of a file may begin with a byte order mark."""
    return line.isspace() or (number == 1 and not line.removeprefix(codecs.BOM_UTF8).strip())


def is_one_per_line(path: Path) -> bool:
    """Whether the first line that is not blank is a value of its own, or is broken within itself.

    An array of rows is not, and neither is the first line of an object over several lines.
    """
    with open_bytes(path) as file:
        line = next((line for line in file if line.removeprefix(codecs.BOM_UTF8).strip()), b"")
    line = line.removeprefix(codecs.BOM_UTF8).strip()
    if line.startswith(b"["):
        return False
    try:
        json.loads(line.decode())
    except json.JSONDecodeError as error:
        return not (line.startswith(b"{") and error.pos >= len(error.doc.rstrip()))
    except (ValueError, RecursionError):  # told with its place once the line is read
        return True
    return True


def json_rows(path: Path, *, drop_bad: bool = False) -> Iterator[Row]:
    """Yield ("file:line", object) for each object; the line is the one the object starts on.

    Args:
        path: of the file, which may be compressed.
        drop_bad: yield a `BadRow` for a value that is no row; after a syntax error no row is found.

    Raises:
        DataError: on invalid UTF-8, a syntax error, or an element that is not an object.
    """
    with open_bytes(path) as file:
        window = _Window(path, file)
        if window.peek() == "[":
            yield from _array_rows(window, drop_bad=drop_bad)
        else:
            while window.peek():
                location, value = _row_at(window, drop_bad=drop_bad)
                is_row = isinstance(value, dict)
                yield from wrapped_rows(value, location) if is_row else [(location, value)]


def _row_at(window: _Window, *, drop_bad: bool) -> Row:
    location = window.location()
    value = window.decode()
    try:
        return location, window.checked(_as_object(value, location), location)
    except DataError as error:
        if not drop_bad:
            raise
        return location, BadRow(error)


def _array_rows(window: _Window, *, drop_bad: bool) -> Iterator[Row]:
    window.skip("[")
    if window.peek() != "]":
        while True:
            yield _row_at(window, drop_bad=drop_bad)
            if window.peek() != ",":
                break
            window.skip(",")
            window.peek()
    window.skip("]")
    if window.peek():
        window.fail("text after the end of the array")


def _decode_line(line: bytes, location: str) -> Any:
    try:
        return _LINES.decode(line.decode())
    except UnicodeDecodeError as error:
        raise _not_utf8(f"{location}:{error.start + 1}", error) from error
    except json.JSONDecodeError as error:
        raise DataError(f"{location}:{error.colno}: broken JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{location}: cannot read this JSON: {error}") from error


def _as_object(value: Any, location: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    hint = "; lists of values need a CSV file" if isinstance(value, list) else ""
    raise DataError(
        f'{location}: a row must be an object such as {{"messages": [...]}}, '
        f"found {type(value).__name__} {json.dumps(value)[:40]}{hint}"
    )


def _not_utf8(location: str, error: UnicodeDecodeError) -> DataError:
    byte = error.object[error.start]
    return DataError(f"{location}: invalid UTF-8 (byte 0x{byte:02x}); save the file as UTF-8")


class _Window:
    """The undecoded part of a file that is in memory, and the line and column it is at."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.path = path
        self._file = file
        self._to_text = codecs.getincrementaldecoder("utf-8-sig")()
        self._decoder = StrictDecoder()
        self._text = ""
        self._position = 0  # of the next character, in _text
        self._start = 0  # of the value that was decoded last
        self._marked = 0  # a position whose line and column are known
        self._line = self._column = 1
        self._at_end = False

    def location(self, position: int | None = None, *, column: bool = False) -> str:
        """Return "file:line[:column]" of a position, by default the next character's."""
        until = self._position if position is None else position
        lines = self._text.count("\n", self._marked, until)
        start = self._text.rfind("\n", self._marked, until)
        self._column = until - start if lines else self._column + until - self._marked
        self._line += lines
        self._marked = until
        return f"{self.path}:{self._line}" + (f":{self._column}" if column else "")

    def fail(self, reason: str, position: int | None = None) -> NoReturn:
        """Raise a DataError that names the position."""
        raise DataError(f"{self.location(position, column=True)}: broken JSON: {reason}")

    def peek(self) -> str:
        """Skip whitespace and return the next character, "" at the end of the file."""
        while True:
            while self._position < len(self._text):
                character = self._text[self._position]
                if character not in _WHITESPACE:
                    return character
                self._position += 1
            if self._at_end:
                return ""
            self._grow()

    def skip(self, expected: str) -> None:
        """Step over one character."""
        found = self.peek()
        if found != expected:
            self.fail(f"expected {expected!r}, found {found!r}" if found else "the file ends here")
        self._position += 1

    def decode(self) -> Any:
        """Decode the value that starts at the next character."""
        while True:
            try:
                self._start = self._position
                value, self._position = self._decoder.raw_decode(self._text, self._start)
            except json.JSONDecodeError as error:
                if self._at_end or not self._may_be_cut(error):
                    self.fail(error.msg, error.pos)
                self._grow()
            except (ValueError, RecursionError) as error:
                raise DataError(f"{self.location()}: cannot read this JSON: {error}") from error
            else:
                return value

    def checked(self, value: dict[str, Any], location: str) -> dict[str, Any]:
        """Return the value that was decoded last; raise a DataError if a key is lost in it."""
        try:
            self._decoder.check(value, self._text, self._start, self._position)
        except ValueError as error:
            raise DataError(f"{location}: cannot read this JSON: {error}") from error
        return value

    def _may_be_cut(self, error: json.JSONDecodeError) -> bool:
        near_end = error.pos >= len(self._text) - _TRUNCATION
        return near_end or error.msg.startswith("Unterminated string")

    def _grow(self) -> None:
        """Forget what is decoded and at least double the rest, so that retries stay linear."""
        self.location()
        rest = self._text[self._position :]
        raw = self._file.read(max(_WINDOW, len(rest)))
        self._at_end = not raw
        try:
            new = self._to_text.decode(raw, final=self._at_end)
        except UnicodeDecodeError as error:
            self._text = rest + error.object[: error.start].decode()
            self._position = self._marked = 0
            raise _not_utf8(self.location(len(self._text), column=True), error) from error
        self._text, self._position, self._marked = rest + new, 0, 0

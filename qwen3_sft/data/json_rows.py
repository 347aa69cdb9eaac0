"""Read rows from JSON and JSON lines files; every error names file, line and column.

A `.json` file may be one array of objects (LongAlpaca: hundreds of megabytes in one array), one
object, or objects one after the other. It is decoded through a window that grows only while an
object does not fit, so memory follows the largest row and not the file.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from qwen3_sft.data.tally import Tally
from qwen3_sft.errors import DataError

Row = tuple[str, dict[str, Any]]  # location, content

BLANK_LINE = "blank line skipped"
_WINDOW = 1 << 20  # bytes read at a time
_WHITESPACE = " \t\n\r"
_TRUNCATION = 16  # a value cut by the window's end fails within its last token: `false`, `\\uABCD`


def jsonl_rows(path: Path, tally: Tally) -> Iterator[Row]:
    """Yield ("file:line", object) for each line that is not blank.

    Raises:
        DataError: on invalid UTF-8, a syntax error, or a line that is not an object.
    """
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            line = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
            location = f"{path}:{number}"
            if not line.strip():
                tally.add(BLANK_LINE, location)
                continue
            yield location, _as_object(_decode_line(line, location), location)


def json_rows(path: Path) -> Iterator[Row]:
    """Yield ("file:line", object) for each object; the line is the one the object starts on.

    Raises:
        DataError: on invalid UTF-8, a syntax error, or an element that is not an object.
    """
    with path.open("rb") as file:
        window = _Window(path, file)
        if window.peek() == "[":
            yield from _array_rows(window)
        else:
            while window.peek():
                location = window.location()
                yield location, _as_object(window.decode(), location)


def _array_rows(window: _Window) -> Iterator[Row]:
    window.skip("[")
    if window.peek() != "]":
        while True:
            location = window.location()
            yield location, _as_object(window.decode(), location)
            if window.peek() != ",":
                break
            window.skip(",")
            window.peek()
    window.skip("]")
    if window.peek():
        window.fail("text after the end of the array")


def _decode_line(line: bytes, location: str) -> Any:
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise _not_utf8(f"{location}:{error.start + 1}", error) from error
    except json.JSONDecodeError as error:
        raise DataError(f"{location}:{error.colno}: broken JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{location}: JSON that Python cannot read: {error}") from error


def _as_object(value: Any, location: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    hint = "; an array of rows belongs in a .json file" if isinstance(value, list) else ""
    raise DataError(
        f'{location}: a row must be an object such as {{"messages": [...]}}, '
        f"found {type(value).__name__} {json.dumps(value)[:40]}{hint}"
    )


def _not_utf8(location: str, error: UnicodeDecodeError) -> DataError:
    byte = error.object[error.start]
    return DataError(f"{location}: invalid UTF-8 (byte 0x{byte:02x}); save the file as UTF-8")


class _Window:
    """The undecoded part of a file that is in memory, and the line and column it is at."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self._file = file
        self._to_text = codecs.getincrementaldecoder("utf-8-sig")()
        self._decoder = json.JSONDecoder()
        self._text = ""
        self._position = 0  # of the next character, in _text
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
                value, self._position = self._decoder.raw_decode(self._text, self._position)
            except json.JSONDecodeError as error:
                if self._at_end or not self._may_be_cut(error):
                    self.fail(error.msg, error.pos)
                self._grow()
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{self.location()}: JSON that Python cannot read: {error}"
                ) from error
            else:
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

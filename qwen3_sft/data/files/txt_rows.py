"""Read plain text files; what one text is, the file, a paragraph or a line, has to be said."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from qwen3_sft.data.files.compressed import open_bytes
from qwen3_sft.data.json_rows import Row
from qwen3_sft.errors import DataError

TxtRows = Literal["file", "paragraph", "line"]


def txt_rows(path: Path, rows: TxtRows | None) -> Iterator[Row]:
    """Yield ("file:line", {"text": ...}); the line is the one the text starts on.

    Args:
        path: of the file, which may be compressed.
        rows: what one text is; paragraphs are divided by blank lines.

    Raises:
        DataError: on invalid UTF-8, or if `rows` is not said.
    """
    if rows is None:
        raise DataError(
            f"{path}: a .txt file does not say where a text ends; set --txt_rows to file, "
            "paragraph or line"
        )
    with open_bytes(path) as file:
        lines = io.TextIOWrapper(file, encoding="utf-8-sig")
        try:
            for start, text in _texts(lines, rows):
                yield f"{path}:{start}", {"text": text}
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: invalid UTF-8 ({error}); save the file as UTF-8") from error


def _texts(lines: io.TextIOWrapper, rows: TxtRows) -> Iterator[tuple[int, str]]:
    if rows == "file":
        yield 1, lines.read()
        return
    start, collected = 1, list[str]()
    for number, line in enumerate(lines, 1):
        if line.strip():
            start = start if collected else number
            collected.append(line)
        if collected and (rows == "line" or not line.strip()):
            yield start, "".join(collected).rstrip("\n")
            collected = []
    if collected:
        yield start, "".join(collected).rstrip("\n")

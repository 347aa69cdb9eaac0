"""Read rows from CSV and TSV files; a location is "file:line" of the row's last line."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator
from pathlib import Path

from qwen3_sft.data.files.compressed import open_bytes
from qwen3_sft.data.json_rows import BadRow, Row
from qwen3_sft.errors import DataError


def csv_rows(path: Path, delimiter: str, *, drop_bad: bool = False) -> Iterator[Row]:
    """Yield the rows under the names of the first line; an empty cell is null, as in a table.

    Args:
        path: of the file, which may be compressed.
        delimiter: between the cells.
        drop_bad: yield a `BadRow` for a row with another number of cells, otherwise an error.

    Raises:
        DataError: on invalid UTF-8, a header with a name twice, or text that is no CSV.
    """
    csv.field_size_limit(sys.maxsize)  # 128 KiB otherwise, less than a conversation may have
    with open_bytes(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        try:
            header = next(reader, [])
            _check_header(header, path)
            for cells in reader:
                location = f"{path}:{reader.line_num}"
                if not cells:
                    continue
                if len(cells) == len(header):
                    yield location, dict(zip(header, cells, strict=True))
                    continue
                error = DataError(
                    f"{location}: {len(cells)} cells, but the first line names {len(header)}; put "
                    f"cells with {delimiter!r} or line breaks into quotes"
                )
                if not drop_bad:
                    raise error
                yield location, BadRow(error)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}:{reader.line_num + 1}: invalid UTF-8 near this line ({error.reason}); "
                "save the file as UTF-8"
            ) from error
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: broken CSV: {error}") from error


def _check_header(header: list[str], path: Path) -> None:
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(f"{path}:1: the first line names {', '.join(twice)} twice")

"""Which reader reads a file, by its ending in upper or lower case."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qwen3_sft.data.files.compressed import COMPRESSED, kind_of
from qwen3_sft.data.files.csv_rows import csv_rows
from qwen3_sft.data.files.table_rows import arrow_rows, parquet_rows
from qwen3_sft.data.files.txt_rows import TxtRows, txt_rows
from qwen3_sft.data.json_rows import Row, json_rows, jsonl_rows
from qwen3_sft.data.tally import Tally
from qwen3_sft.errors import DataError

_TEXT_KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt")
_TABLES = (".parquet", ".arrow")
KINDS = (*_TEXT_KINDS, *_TABLES)


@dataclass(frozen=True, slots=True)
class FileOptions:
    """What readers need to know besides the path.

    Attributes:
        drop_bad: a row that cannot be read is yielded as `BadRow`, not raised.
        txt_rows: what one text of a `.txt` file is.
    """

    drop_bad: bool = False
    txt_rows: TxtRows | None = None


def is_data_file(path: Path) -> bool:
    """Whether some reader reads files of this ending."""
    kind, compression = kind_of(path)
    return kind in (_TEXT_KINDS if compression else KINDS)


def file_rows(path: Path, tally: Tally, options: FileOptions) -> Iterator[Row]:
    """Return the rows of a file.

    Raises:
        DataError: for an ending that no reader reads.
    """
    kind, _ = kind_of(path)
    if is_data_file(path):
        match kind:
            case ".jsonl" | ".ndjson":
                return jsonl_rows(path, tally, drop_bad=options.drop_bad)
            case ".json":
                return json_rows(path, drop_bad=options.drop_bad)
            case ".csv" | ".tsv":
                delimiter = "," if kind == ".csv" else "\t"
                return csv_rows(path, delimiter, drop_bad=options.drop_bad)
            case ".txt":
                return txt_rows(path, options.txt_rows)
            case ".parquet":
                return parquet_rows(path)
            case ".arrow":
                return arrow_rows(path)
    raise DataError(
        f"{path}: unknown kind of file {''.join(path.suffixes[-2:])!r}; accepted are "
        f"{', '.join(KINDS)}, those of text also with {', '.join(COMPRESSED)}"
    )

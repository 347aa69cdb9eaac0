"""Read rows from Parquet and Arrow files in batches; a location is "file:row N", from 1."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen3_sft.data.json_rows import Row
from qwen3_sft.errors import DataError

if TYPE_CHECKING:
    import pyarrow

_BATCH_ROWS = 512


def parquet_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a Parquet file.

    Raises:
        DataError: if the file is damaged or holds text that is not UTF-8.
    """
    import pyarrow.parquet

    with _readable(path), pyarrow.parquet.ParquetFile(path, memory_map=True) as table:
        _refuse_twice(table.schema_arrow, path)
        yield from _numbered_rows(path, table.iter_batches(_BATCH_ROWS))


def arrow_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of an Arrow file, either the IPC file or the IPC stream layout.

    Raises:
        DataError: if the file is damaged or holds text that is not UTF-8.
    """
    import pyarrow

    with _readable(path), pyarrow.memory_map(str(path)) as file:
        is_stream = file.read(6) != b"ARROW1"
        file.seek(0)
        if is_stream:
            reader: Any = pyarrow.ipc.open_stream(file)
            batches: Iterator[Any] = iter(reader)
        else:
            reader = pyarrow.ipc.open_file(file)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        _refuse_twice(reader.schema, path)
        yield from _numbered_rows(path, _in_slices(batches))


def _refuse_twice(schema: pyarrow.Schema, path: Path) -> None:
    """Refuse two columns of one name, of which a row would keep the last."""
    if twice := sorted({name for name in schema.names if schema.names.count(name) > 1}):
        raise DataError(f"{path}: the column {', '.join(twice)} is there twice; keep one")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    from pyarrow import ArrowException

    try:
        yield
    except (ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot read this table: {error}") from error


def _in_slices(batches: Iterator[pyarrow.RecordBatch]) -> Iterator[pyarrow.RecordBatch]:
    for batch in batches:
        for start in range(0, batch.num_rows, _BATCH_ROWS):
            yield batch.slice(start, _BATCH_ROWS)


def _numbered_rows(path: Path, batches: Iterator[pyarrow.RecordBatch]) -> Iterator[Row]:
    done = 0
    for batch in batches:
        for number, row in enumerate(_as_dicts(path, batch, done), done + 1):
            yield f"{path}:row {number}", row
        done += batch.num_rows


def _as_dicts(path: Path, batch: pyarrow.RecordBatch, done: int) -> list[dict[str, Any]]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        # Find the row at fault, which the exception for a whole batch does not name.
        for index in range(batch.num_rows):
            try:
                batch.slice(index, 1).to_pylist()
            except UnicodeDecodeError as error:
                raise DataError(f"{path}:row {done + index + 1}: invalid UTF-8: {error}") from error
        raise

"""Number the rows of all sources, name their columns and recognise their format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, groupby, islice
from typing import TYPE_CHECKING, Any, cast

from qwen3_sft.data.formats import Format, detect_format, is_known, require_format
from qwen3_sft.data.json_rows import BadRow, Row
from qwen3_sft.data.readers import EntrySource
from qwen3_sft.data.rows.columns import named_columns
from qwen3_sft.data.rows.nulls import find_fillers
from qwen3_sft.data.rows.source import Reading
from qwen3_sft.data.tally import Tally
from qwen3_sft.errors import DataError

if TYPE_CHECKING:
    from qwen3_sft.options.data_args import DataArguments

OBSERVED_ROWS = 256  # of each source, from which is read where null means absent


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row as read: its number over all sources (from 0), its location and its format.

    Attributes:
        problem: why it has none of the formats, for a row that will be dropped.
    """

    number: int
    location: str
    content: dict[str, Any]
    fmt: Format
    reading: Reading
    problem: str | None = None


@dataclass(slots=True)
class RowsRead:
    """What is learnt of the sources while their rows are read.

    Attributes:
        warnings: what readers skip, and sources that are empty.
        formats: sources per row format.
        first_rows: number of the first row of each entry that was begun.
    """

    warnings: Tally = field(default_factory=Tally)
    formats: Counter[str] = field(default_factory=Counter)
    first_rows: list[int] = field(default_factory=list)


def raw_rows(sources: list[EntrySource], args: DataArguments, read: RowsRead) -> Iterator[RawRow]:
    """Read rows and recognise their format, one format per source.

    Args:
        sources: read in order, each by what its entry says.
        args: `max_rows` over all sources, columns that are ignored, and what becomes of a bad row.
        read: receives what is learnt on the way.

    Raises:
        DataError: for a row of an unknown format, or of another than its file's first, unless bad
            rows are dropped.
    """
    number = 0
    for _, of_entry in groupby(sources, key=lambda source: source.number):
        group = list(of_entry)
        if args.max_rows is not None and number >= args.max_rows:
            return
        read.first_rows.append(number)
        rows = chain.from_iterable(_rows_of(source, args, read) for source in group)
        room = None if args.max_rows is None else args.max_rows - number
        limits = [limit for limit in (group[0].entry.max_rows, room) if limit is not None]
        for fields in islice(rows, min(limits, default=None)):
            yield RawRow(number, *fields)
            number += 1


_Fields = tuple[str, dict[str, Any], Format, Reading, str | None]


def _rows_of(source: EntrySource, args: DataArguments, read: RowsRead) -> Iterator[_Fields]:
    entry, naming = source.entry, named_columns(source.entry.columns or ())
    wanted = cast("Format | None", None if entry.format == "auto" else entry.format)
    source_format: Format | None = None
    rows = iter(source.reader.rows(read.warnings))
    first, failure = _first_rows(rows)
    good = [(row, location) for location, row in first if not isinstance(row, BadRow)]
    naming.check_found([row for row, _ in good], source.name)
    contents = [naming(row, location) for row, location in good]
    reading = Reading(frozenset(args.ignore_columns), wanted is not None, find_fillers(contents))
    for location, row in chain(first, _raising(failure), rows):
        try:
            if isinstance(row, BadRow):
                raise row.error
            content = naming(row, location)
            fmt = detect_format(_columns(content, reading), location, wanted)
            require_format(source_format or fmt, fmt, location)
        except DataError as error:
            if args.on_bad_row == "error":
                raise
            yield location, {}, source_format or "messages", reading, str(error)
            continue
        if source_format is None:
            source_format = fmt
            read.formats[fmt] += 1
        yield location, content, fmt, reading, None
    if not first:
        read.warnings.add("source without rows", source.name)


def _first_rows(rows: Iterator[Row]) -> tuple[list[Row], DataError | None]:
    """Return the rows that are looked at ahead, and the error that ends them, if one does."""
    first: list[Row] = []
    try:
        first.extend(islice(rows, OBSERVED_ROWS))  # keeps what came before an error
    except DataError as error:
        return first, error
    return first, None


def _raising(failure: DataError | None) -> Iterator[Row]:
    """Raise what reading ahead met, once the rows before it have been passed on."""
    if failure is not None:
        raise failure
    yield from ()


def _columns(content: dict[str, Any], reading: Reading) -> list[str]:
    """Return the columns that tell the format: those that are not null, if they are of any."""
    names = [name for name in content if name not in reading.ignored]
    filled = [name for name in names if content[name] is not None]
    return filled if is_known(filled) else names

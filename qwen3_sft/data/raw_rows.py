"""Number the rows of all sources, name their columns and recognise their format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, groupby, islice
from typing import TYPE_CHECKING, Any, cast

from qwen3_sft.data.files.line_ranges import LineRange
from qwen3_sft.data.formats import Format, detect_format, is_known, require_format
from qwen3_sft.data.json_rows import BadRow, Row
from qwen3_sft.data.readers import EntrySource, FileSource
from qwen3_sft.data.rows.columns import NamedColumns, named_columns
from qwen3_sft.data.rows.nulls import find_fillers
from qwen3_sft.data.rows.source import Reading
from qwen3_sft.data.tally import Tally
from qwen3_sft.errors import DataError, told_as

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


@dataclass(frozen=True, slots=True)
class RowRange:
    """Rows that the process that tokenises them reads itself.

    Attributes:
        lines: of a file.
        number: of the first row, over all sources.
        settled: how they are read.
    """

    lines: LineRange
    number: int
    settled: Settled

    def rows(self) -> Iterator[RawRow]:
        """Yield the rows.

        Raises:
            DataError: as `raw_rows`.
        """
        with told_as(DataError, self.lines.path, OSError):
            read = self.lines.read(drop_bad=self.settled.drop_bad)
            for number, (location, row) in enumerate(read, self.number):
                yield RawRow(number, *self.settled.recognised(location, row))


_Fields = tuple[str, dict[str, Any], Format, Reading, str | None]


@dataclass(frozen=True, slots=True)
class Settled:
    """How the rows of a source are read, which its first rows tell.

    Attributes:
        naming: of its columns.
        wanted: the format that was chosen.
        fmt: of its first row; None before there is one.
        reading: what is ignored, and which nulls stand for absent keys.
        drop_bad: a row with a defect is passed on with its problem, not raised.
    """

    naming: NamedColumns
    wanted: Format | None
    fmt: Format | None
    reading: Reading
    drop_bad: bool

    def recognised(self, location: str, row: Any) -> _Fields:
        """Return what a `RawRow` has besides its number.

        Raises:
            DataError: as `raw_rows`.
        """
        try:
            if isinstance(row, BadRow):
                raise row.error
            content = self.naming(row, location)
            fmt = detect_format(_columns(content, self.reading), location, self.wanted)
            require_format(self.fmt or fmt, fmt, location)
        except DataError as error:
            if not self.drop_bad:
                raise
            return location, {}, self.fmt or "messages", self.reading, str(error)
        return location, content, fmt, self.reading, None


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
    for row in rows_or_ranges(sources, args, read, in_ranges=False):
        assert isinstance(row, RawRow)
        yield row


def rows_or_ranges(
    sources: list[EntrySource], args: DataArguments, read: RowsRead, *, in_ranges: bool = True
) -> Iterator[RawRow | RowRange]:
    """Yield rows as `raw_rows` does, and ranges of rows in place of those that others can read.

    Raises:
        DataError: as `raw_rows`; for a row of a range once that is read.
    """
    number = 0
    for _, of_entry in groupby(sources, key=lambda source: source.number):
        group = list(of_entry)
        if args.max_rows is not None and number >= args.max_rows:
            return
        read.first_rows.append(number)
        room = None if args.max_rows is None else args.max_rows - number
        limit = min((n for n in (group[0].entry.max_rows, room) if n is not None), default=None)
        end = None if limit is None else number + limit
        for source in group:
            if number == end:
                break
            left = None if end is None else end - number
            for item in _rows_of(source, args, read, left, in_ranges=in_ranges):
                if isinstance(item, RowRange):
                    yield replace(item, number=number)
                    number += item.lines.rows
                else:
                    yield RawRow(number, *item)
                    number += 1


def _rows_of(
    source: EntrySource, args: DataArguments, read: RowsRead, limit: int | None, *, in_ranges: bool
) -> Iterator[_Fields | RowRange]:
    """Yield the rows of a source, `limit` at most."""
    entry, naming = source.entry, named_columns(source.entry.columns or ())
    wanted = cast("Format | None", None if entry.format == "auto" else entry.format)
    rows = iter(source.reader.rows(read.warnings))
    first, failure = _first_rows(rows)
    good = [(row, location) for location, row in first if not isinstance(row, BadRow)]
    naming.check_found([row for row, _ in good], source.name)
    reading = Reading(
        frozenset(args.ignore_columns),
        wanted is not None,
        find_fillers(_named(good, naming)),
        source.split,
    )
    settled = Settled(naming, wanted, None, reading, args.on_bad_row == "drop")
    all_rows = islice(chain(first, _raising(failure), rows), limit)
    for passed, (location, row) in enumerate(all_rows, 1):
        fields = settled.recognised(location, row)
        if settled.fmt is None and fields[-1] is None:
            settled = replace(settled, fmt=fields[2])
            read.formats[fields[2]] += 1
        yield fields
        if in_ranges and passed == OBSERVED_ROWS and settled.fmt is not None:
            left = None if limit is None else limit - passed
            ranges = _ranges(source, passed, left, read)
            if ranges is not None:
                with told_as(DataError, source.name, OSError):
                    yield from (RowRange(lines, 0, settled) for lines in ranges)
                return
    if not first:
        read.warnings.add("source without rows", source.name)


def _ranges(
    source: EntrySource, skip: int, limit: int | None, read: RowsRead
) -> Iterator[LineRange] | None:
    reader = source.reader
    return reader.ranges(skip, limit, read.warnings) if isinstance(reader, FileSource) else None


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


def _named(
    rows: list[tuple[dict[str, Any], str]], naming: NamedColumns
) -> Iterator[dict[str, Any]]:
    """Yield rows under the names of the formats, but for those that have an error to come."""
    for row, location in rows:
        try:
            yield naming(row, location)
        except DataError:  # raised, or dropped, in its turn
            continue


def _columns(content: dict[str, Any], reading: Reading) -> list[str]:
    """Return the columns that tell the format: those that are not null, if they are of any."""
    names = [name for name in content if name not in reading.ignored]
    filled = [name for name in names if content[name] is not None]
    return filled if is_known(filled) else names

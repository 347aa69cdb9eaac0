"""Number the rows of all sources and recognise their format, one format per source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from qwen3_sft.data.formats import Format, detect_format, require_format
from qwen3_sft.data.readers import RowSource
from qwen3_sft.data.tally import Tally

if TYPE_CHECKING:
    from qwen3_sft.options.data_args import DataArguments


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row as read: its number over all sources (from 0), its location and its format."""

    number: int
    location: str
    content: dict[str, Any]
    fmt: Format
    is_table: bool


def raw_rows(
    sources: list[RowSource], args: DataArguments, warnings: Tally, formats: Counter[str]
) -> Iterator[RawRow]:
    """Read rows and recognise their format, one format per source.

    Args:
        sources: read in order.
        args: `max_rows` over all sources, and the `dataset_format` where several would fit.
        warnings: receives what readers skip and sources that are empty.
        formats: receives one count per source and format.

    Raises:
        DataError: for a row of an unknown format, or of another than its file's first.
    """
    wanted = None if args.dataset_format == "auto" else args.dataset_format
    rows = chain.from_iterable(_rows_of(source, wanted, warnings, formats) for source in sources)
    for number, fields in enumerate(islice(rows, args.max_rows)):
        yield RawRow(number, *fields)


def _rows_of(
    source: RowSource, wanted: Format | None, warnings: Tally, formats: Counter[str]
) -> Iterator[tuple[str, dict[str, Any], Format, bool]]:
    source_format = None
    for location, content in source.rows(warnings):
        fmt = detect_format(content, location, wanted)
        if source_format is None:
            source_format = fmt
            formats[fmt] += 1
        require_format(source_format, fmt, location)
        yield location, content, fmt, source.is_table
    if source_format is None:
        warnings.add("source without rows", source.name)

"""What each entry of a mixture gives: rows, samples, tokens and labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from qwen3_sft.data.raw_rows import RowsRead
from qwen3_sft.data.token_store import PackedSamples, entry_of
from qwen3_sft.options.data_entries import DataEntry, source_names

_COUNTED = ("rows_used", "samples_used", "tokens_used", "label_tokens")


class SourceCounts:
    """Adds up samples per entry as they are written, in the process that reads the rows."""

    def __init__(self, entries: Sequence[DataEntry], read: RowsRead) -> None:
        """Count for `entries`, whose first rows `read` knows by the time their samples come."""
        self._entries, self._read = entries, read
        self._counts = np.zeros((len(_COUNTED), len(entries)), np.int64)

    def add(self, samples: PackedSamples) -> None:
        """Count used samples; those of one row come together."""
        if not len(samples.rows):
            return
        first_rows, size = self._read.first_rows, len(self._entries)
        of_sample = entry_of(samples.rows, first_rows)
        of_row = entry_of(np.unique(samples.rows), first_rows)
        self._counts += [
            np.bincount(of_row, minlength=size),
            np.bincount(of_sample, minlength=size),
            np.bincount(of_sample, samples.lengths, size).astype(np.int64),
            np.bincount(of_sample, samples.labels, size).astype(np.int64),
        ]

    def report(self, rows_in: int) -> list[dict[str, Any]]:
        """Return the `sources` of a data report, given the rows of all entries."""
        begun = self._read.first_rows
        starts = [*begun, *[rows_in] * (len(self._entries) + 1 - len(begun))]
        return [
            {
                "source": name,
                "path": entry.path,
                "first_row": starts[number],
                "repeat": entry.repeat,
                "rows_in": starts[number + 1] - starts[number],
                **dict(zip(_COUNTED, self._counts[:, number].tolist(), strict=True)),
            }
            for number, (entry, name) in enumerate(
                zip(self._entries, source_names(self._entries), strict=True)
            )
        ]


def source_lines(report: dict[str, Any]) -> Iterator[str]:
    """Yield a line per source: its counts, and its share of the labels of an epoch."""
    sources = report["sources"]
    labels = [source["label_tokens"] * source["repeat"] for source in sources]
    if len(sources) == 1 and labels[0] == sources[0]["label_tokens"]:
        return
    for source, part in zip(sources, labels, strict=True):
        share = part / sum(labels) if sum(labels) else 0.0
        yield (
            f"source    {source['source']}: {source['rows_in']:,} rows, {source['samples_used']:,} "
            f"samples, {source['tokens_used']:,} tokens, {source['label_tokens']:,} labels, "
            f"x {source['repeat']:g} = {share:.1%} of an epoch's labels"
        )

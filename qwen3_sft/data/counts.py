"""What became of rows, samples and tokens, in a form that workers can add up."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from qwen3_sft.data.rows.defects import MOST_LISTED
from qwen3_sft.data.tally import Tally

NUM_LONGEST = 10


@dataclass(slots=True)
class Counts:
    """What became of rows, samples and tokens; every token read is in exactly one entry.

    Attributes:
        rows_split: rows that became several samples.
        tokens_repeated: tokens of these samples beyond those of each row's longest, which holds
            the whole conversation: the history that is computed again.
    """

    rows_in: int = 0
    rows_used: int = 0
    rows_dropped: Tally = field(default_factory=Tally)
    dropped: list[tuple[str, str]] = field(default_factory=list)  # location, reason
    rows_split: int = 0
    samples_of_split_rows: int = 0
    tokens_repeated: int = 0
    samples_in: int = 0
    samples_truncated: int = 0
    samples_dropped: Tally = field(default_factory=Tally)
    tokens_in: int = 0
    tokens_used: int = 0
    tokens_truncated: int = 0
    tokens_dropped: int = 0
    label_tokens: int = 0
    turn_ends: Counter[str] = field(default_factory=Counter)
    warnings: Tally = field(default_factory=Tally)
    longest: list[tuple[int, str]] = field(default_factory=list)

    def drop(self, kind: str, location: str, reason: str | None = None) -> None:
        """Count a row that is left out, and list it."""
        self.rows_dropped.add(kind, location)
        if len(self.dropped) < MOST_LISTED:
            self.dropped.append((location, reason or kind))

    def add_splits(self, lengths: Iterable[list[int]]) -> None:
        """Count rows of several samples, given the tokens of each sample of each row."""
        for of_row in (tokens for tokens in lengths if len(tokens) > 1):
            self.rows_split += 1
            self.samples_of_split_rows += len(of_row)
            self.tokens_repeated += sum(of_row) - max(of_row)

    def merge(self, later: Counts) -> None:
        """Add the counts of rows that come after these."""
        self.dropped = (self.dropped + later.dropped)[:MOST_LISTED]
        for name in ("rows_dropped", "samples_dropped", "warnings"):
            getattr(self, name).merge(getattr(later, name))
        self.turn_ends += later.turn_ends
        self.longest = heapq.nlargest(NUM_LONGEST, self.longest + later.longest)
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + getattr(later, name))


_SUMS = (
    "rows_in", "rows_used", "rows_split", "samples_of_split_rows", "tokens_repeated",
    "samples_in", "samples_truncated", "tokens_in", "tokens_used", "tokens_truncated",
    "tokens_dropped", "label_tokens",
)  # fmt: skip

"""Counts by kind, each with the place where the kind was first seen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


class Tally:
    """How often each kind of event occurred and where first.

    Merging tallies in the order of the data gives the same result as counting in one go, so that
    workers can count apart.
    """

    def __init__(self) -> None:
        self._entries: dict[str, tuple[int, str]] = {}

    def add(self, kind: str, location: str, count: int = 1) -> None:
        """Count `kind`; `location` is kept if it is the first of its kind."""
        before, first = self._entries.get(kind, (0, location))
        self._entries[kind] = (before + count, first)

    def merge(self, later: Tally) -> None:
        """Add the counts of a tally taken after this one."""
        for kind, count, first in later:
            self.add(kind, first, count)

    def __iter__(self) -> Iterator[tuple[str, int, str]]:
        """Yield (kind, count, first location), the most frequent kind first, then by name."""
        ordered = sorted(self._entries.items(), key=lambda item: (-item[1][0], item[0]))
        for kind, (count, first) in ordered:
            yield kind, count, first

    @property
    def total(self) -> int:
        """All counts together."""
        return sum(count for count, _ in self._entries.values())

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return {kind: {"count": int, "first": location}} for a JSON file."""
        return {kind: {"count": count, "first": first} for kind, count, first in self}

"""Where a row stands, how its file is read, and what is remembered about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from qwen3_sft.data.rows.nulls import NO_FILLERS, Fillers
from qwen3_sft.errors import DataError

IGNORED_FIELD = "{name} ignored as told"


@dataclass(frozen=True, slots=True)
class Reading:
    """How the rows of one file are read.

    Attributes:
        ignored: names of fields to leave out (`--ignore_columns`).
        is_chosen: the format was chosen by `--dataset_format`, so columns of others are not data.
        fillers: which nulls stand for keys that are absent.
        split: that is read; None for evaluation, which may read any.
    """

    ignored: frozenset[str] = frozenset()
    is_chosen: bool = False
    fillers: Fillers = NO_FILLERS
    split: str | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """Where a row stands, and what to remember about it.

    Attributes:
        location: such as ``data.jsonl:17``; every error message begins with it.
        warnings: counts by kind of oddity that is trained on all the same.
        reading: how its file is read.
    """

    location: str
    warnings: Counter[str] = field(default_factory=Counter)
    reading: Reading = Reading()

    def fail(self, problem: str) -> NoReturn:
        """Raise a DataError at this location."""
        raise DataError(f"{self.location}: {problem}")

    def warn(self, kind: str) -> None:
        """Count one oddity of this kind."""
        self.warnings[kind] += 1

    def kept(self, fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        """Return the fields that are there: neither null, which means absent, nor ignored.

        Args:
            fields: of a row, a message, a content part or a tool call.
            prefix: what `--ignore_columns` writes before a name of these fields.
        """
        present = {name: value for name, value in fields.items() if value is not None}
        if self.reading.ignored:
            for name in [n for n in present if prefix + n in self.reading.ignored]:
                del present[name]
                self.warn(IGNORED_FIELD.format(name=prefix + name))
        return present

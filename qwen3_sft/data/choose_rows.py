"""Which rows are compared with the chat template: some of every kind, found by any process."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from qwen3_sft.chat.features import Features
from qwen3_sft.data.raw_rows import RawRow

ROWS_OF_A_KIND = 3


class ChosenRow(NamedTuple):
    """A row, and what it has: in combination, and each for itself."""

    raw: RawRow
    features: tuple[Features, Features]


class RowChooser:
    """Wants the first rows of every combination of features, and of every feature of a value.

    Each process has its own. A row that is among the first of its kind in all data is so among
    those of its process, so that choosing once more in the order of the data gives the same rows
    whatever the number of processes.
    """

    def __init__(self) -> None:
        self._seen: Counter[Features | str] = Counter()

    def wants(self, features: tuple[Features, Features]) -> bool:
        """Whether a row with these features is to be compared; it counts as seen."""
        combination, single = features
        kinds = [combination, *single]
        is_new = any(self._seen[kind] < ROWS_OF_A_KIND for kind in kinds)
        if is_new:
            self._seen.update(kinds)
        return is_new

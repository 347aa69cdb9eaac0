"""How often an epoch takes each document, where sources of a mixture are repeated.

A source that is passed over 2.3 times an epoch gives two copies of every document, and three of
ten documents once more; which ones turns with the epoch, so that after E epochs every document was
taken 2.3 E times, rounded up or down. The trap: the number of packed rows must be the same in every
epoch (see `rows.py`). So the documents that take turns are sorted by length and cut into strata;
a stratum lends as many slots as it sends documents, each as long as its longest ones, and whoever
has its turn fits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

STRATUM = 64  # documents; fewer fit their slots more tightly, more share turns more evenly


@dataclass(frozen=True)
class _Stratum:
    """Documents of similar length that take turns: `size` of them in each epoch.

    Attributes:
        turns: document indices in the order of their turns.
        size: slots.
    """

    turns: np.ndarray
    size: int

    def documents(self, epoch: int, lengths: np.ndarray) -> np.ndarray:
        first = epoch * self.size
        drawn = self.turns[np.arange(first, first + self.size) % len(self.turns)]
        return drawn[np.argsort(-lengths[drawn], kind="stable")]


class Passes:
    """The documents of each epoch, in slots whose number and room never change.

    Attributes:
        lengths: tokens that each slot has room for, (m,) int64.
    """

    def __init__(
        self, lengths: np.ndarray, source_of: np.ndarray, repeats: Sequence[float], seed: int
    ) -> None:
        """Plan the slots.

        Args:
            lengths: tokens of each document, (n,) int64.
            source_of: the source of each document, (n,) int64.
            repeats: passes over each source in one epoch, above 0.
            seed: decides the order of turns.
        """
        self._lengths = lengths
        rng = np.random.default_rng((seed, len(lengths)))
        copies = np.floor(np.asarray(repeats, np.float64)).astype(np.int64)
        self._whole = np.repeat(np.arange(len(lengths)), copies[source_of])
        self._strata: list[_Stratum] = []
        room = [lengths[self._whole]]
        for source, repeat in enumerate(repeats):
            if share := repeat - copies[source]:
                for members, size in _strata(np.flatnonzero(source_of == source), lengths, share):
                    self._strata.append(_Stratum(rng.permutation(members), size))
                    room.append(lengths[members[:size]])
        self.lengths = np.concatenate(room)

    def documents(self, epoch: int) -> np.ndarray:
        """Return the document in each slot, (m,) int64, in an epoch counted from 0."""
        turns = [stratum.documents(epoch, self._lengths) for stratum in self._strata]
        return np.concatenate([self._whole, *turns])


def _strata(
    documents: np.ndarray, lengths: np.ndarray, share: float
) -> Iterator[tuple[np.ndarray, int]]:
    """Yield (documents, longest first; slots) of each stratum of one source."""
    longest_first = documents[np.argsort(-lengths[documents], kind="stable")]
    width = max(STRATUM, math.ceil(STRATUM / 4 / share))
    start = 0
    for members in np.array_split(longest_first, max(1, len(documents) // width)):
        end = start + len(members)
        if size := round(share * end) - round(share * start):
            yield members, size
        start = end

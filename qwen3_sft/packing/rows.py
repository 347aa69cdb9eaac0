"""Put documents into rows of one fixed length, by their lengths alone; no token is copied.

Best-fit decreasing: the longest document first, each into the fullest row that still has room. The
rows' free spaces are the set bits of one Python integer, so the fullest row that fits a document of
x tokens is the lowest set bit at or above x; documents of one length are placed together.

Which of several equally long documents goes where, and the order of rows and documents, follow
from (seed, epoch). The trap: the number of rows must not, or a resumed run would disagree about the
number of steps; therefore the bins are computed once and only their content is drawn anew.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch.utils.data

from qwen3_sft.packing.passes import Passes

Document = tuple[np.ndarray, np.ndarray]  # input ids (n,) int32, trained (n,) bool


class Documents(Protocol):
    """What can be packed: a sized, indexable collection that knows its lengths."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, (n,) int64."""
        ...

    def __getitem__(self, index: int) -> Document: ...


def pack(lengths: np.ndarray, max_length: int) -> tuple[np.ndarray, int]:
    """Assign each document to a bin by best-fit decreasing.

    Args:
        lengths: (n,) int, tokens of each document, from 1 to `max_length`.
        max_length: tokens that a bin holds.

    Returns:
        The bin of each document, (n,) int64, and the number of bins.

    Raises:
        ValueError: if a document is empty or does not fit into a bin.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    _check_lengths(lengths, max_length)
    bin_of_document = np.empty(len(lengths), np.int64)
    longest_first = np.argsort(-lengths, kind="stable")
    values, counts = np.unique(lengths, return_counts=True)
    spaces, start = _FreeSpaces(max_length), 0
    for length, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        bin_of_document[longest_first[start : start + count]] = spaces.place(length, count)
        start += count
    return bin_of_document, spaces.num_bins


def _check_lengths(lengths: np.ndarray, max_length: int) -> None:
    if max_length < 1:
        raise ValueError(f"max_length is {max_length}; a row needs at least 1 token")
    for index in np.flatnonzero((lengths < 1) | (lengths > max_length))[:1]:
        raise ValueError(
            f"document {index} has {lengths[index]} tokens; a row holds 1 to {max_length}: "
            "drop or truncate it first, or raise max_length"
        )


class _FreeSpaces:
    """The bins so far, by the tokens they have left; bit s of `bits` says that some bin has s."""

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.bins_with: list[list[int]] = [[] for _ in range(max_length + 1)]
        self.bits = 0
        self.num_bins = 0

    def place(self, length: int, count: int) -> list[int]:
        """Return the bins of `count` documents of one length, as best fit one by one would.

        A document leaves the fullest fitting bin fuller still, so the next one goes there too while
        it fits; and bins with equal space take equally many, so they are filled as one group.
        """
        placed: list[int] = []
        while count:
            space = self._tightest_fit(length, count)
            per_bin = space // length
            num_full = min(count // per_bin, len(self.bins_with[space]))
            if num_full == 0:
                num_full, per_bin = 1, count
            bins = self._take(space, num_full)
            placed += [number for number in bins for _ in range(per_bin)]
            count -= num_full * per_bin
            self._put(space - per_bin * length, bins)
        return placed

    def _tightest_fit(self, length: int, count: int) -> int:
        """Return the smallest space >= length; open as many empty bins as `count` needs if none."""
        fitting = self.bits >> length
        if not fitting:
            num_new = -(-count // (self.max_length // length))
            self._put(self.max_length, range(self.num_bins, self.num_bins + num_new))
            self.num_bins += num_new
            return self.max_length
        return length + (fitting & -fitting).bit_length() - 1

    def _take(self, space: int, num_bins: int) -> list[int]:
        bins = self.bins_with[space]
        taken = bins[-num_bins:]
        del bins[-num_bins:]
        if not bins:
            self.bits &= ~(1 << space)
        return taken

    def _put(self, space: int, bins: list[int] | range) -> None:
        if space:
            self.bins_with[space].extend(bins)
            self.bits |= 1 << space


class PackedDataset(torch.utils.data.Dataset):
    """Rows of documents for one epoch; row r is a list of (input ids, trained).

    Every document is in exactly one row, unless `passes` says otherwise. Empty rows at the end make
    the number of rows a multiple of `rows_multiple_of`, so that no sampler repeats or leaves out a
    row to share them evenly.
    """

    def __init__(
        self,
        tokens: Documents,
        max_length: int,
        *,
        packing: bool = True,
        seed: int = 0,
        rows_multiple_of: int = 1,
        passes: Passes | None = None,
    ) -> None:
        """Pack for every epoch.

        Args:
            tokens: the documents.
            max_length: tokens of a row.
            packing: several documents in one row.
            seed: decides, with the epoch, the order of rows and documents.
            rows_multiple_of: of the number of rows.
            passes: how often an epoch takes each document; by default once.

        Raises:
            ValueError: `rows_multiple_of` is below 1, or a document does not fit into a row.
        """
        if rows_multiple_of < 1:
            raise ValueError(f"rows_multiple_of is {rows_multiple_of}; it must be at least 1")
        self.tokens = tokens
        self.max_length = max_length
        self.seed = seed
        self._passes = passes
        self._room = lengths = tokens.lengths if passes is None else passes.lengths
        if packing:
            bins, self.num_filled_rows = pack(lengths, max_length)
        else:
            _check_lengths(lengths, max_length)
            bins, self.num_filled_rows = np.arange(len(lengths)), len(lengths)
        self._bin_of_slot = bins[np.argsort(-lengths, kind="stable")]  # longest document first
        self._num_rows = -(-self.num_filled_rows // rows_multiple_of) * rows_multiple_of
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the order of rows and documents from (seed, epoch); lengths per row stay."""
        self.epoch = epoch
        rng = np.random.default_rng((self.seed, epoch))
        lengths = self._room
        shuffled = rng.permutation(len(lengths))
        longest_first = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
        row_of_slot = rng.permutation(self.num_filled_rows)[self._bin_of_slot]
        by_row = np.lexsort((rng.random(len(lengths)), row_of_slot))
        self._documents = longest_first[by_row]
        if self._passes is not None:
            self._documents = self._passes.documents(epoch)[self._documents]
        counts = np.bincount(row_of_slot, minlength=self._num_rows)
        self._row_starts = np.concatenate([[0], np.cumsum(counts)])

    @property
    def fill(self) -> float:
        """Share of all rows' positions that hold a token of a document, empty rows included."""
        positions = self._num_rows * self.max_length
        return float(self.tokens.lengths[self._documents].sum() / positions) if positions else 0.0

    def documents_of(self, row: int) -> np.ndarray:
        """Return the indices of the documents in `row`, in their order."""
        if not 0 <= row < self._num_rows:
            raise IndexError(f"row {row} of {self._num_rows}")
        return self._documents[self._row_starts[row] : self._row_starts[row + 1]]

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, index: int) -> list[Document]:
        return [self.tokens[document] for document in self.documents_of(index).tolist()]

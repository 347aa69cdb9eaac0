from __future__ import annotations

import pickle

import numpy as np
import pytest

from qwen3_sft.packing.rows import PackedDataset, pack


def slow_best_fit(lengths: np.ndarray, max_length: int) -> list[int]:
    """Best-fit decreasing by its definition: try every bin, take the one with the least room.

    Returns the bins' sums: they do not depend on which of two equally full bins is taken.
    """
    bins: list[list[int]] = []
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [b for b in bins if sum(b) + length <= max_length]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            bins.append([length])
    return sorted(map(sum, bins))


class Documents:
    """Documents whose tokens name the document they belong to."""

    def __init__(self, lengths) -> None:
        self.lengths = np.asarray(lengths, np.int64)

    def __getitem__(self, index: int):
        length = self.lengths[index]
        return np.full(length, index, np.int32), np.ones(length, bool)


def random_lengths(seed: int, count: int = 200, max_length: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, max_length + 1, count)


@pytest.mark.parametrize("max_length", [1, 7, 64, 100])
@pytest.mark.parametrize("seed", range(5))
def test_pack_is_best_fit_decreasing(seed, max_length):
    rng = np.random.default_rng(seed)
    # Squares of uniform numbers give many short documents, so that bins hold several.
    lengths = 1 + (rng.random(300) ** 2 * max_length).astype(int)
    bins, num_bins = pack(lengths, max_length)
    sums = np.bincount(bins, lengths, minlength=num_bins)
    assert sorted(sums.tolist()) == slow_best_fit(lengths, max_length)


def test_pack_nothing():
    bins, num_bins = pack(np.empty(0, int), 16)
    assert len(bins) == num_bins == 0


@pytest.mark.parametrize(
    ("lengths", "message"), [([3, 17], "document 1 has 17"), ([0], "0 tokens")]
)
def test_pack_refuses_what_does_not_fit(lengths, message):
    with pytest.raises(ValueError, match=message):
        pack(np.array(lengths), 16)


def test_fill_of_a_million_documents():
    lengths = np.clip(np.random.default_rng(0).lognormal(5.6, 0.9, 1_000_000), 8, 4096).astype(int)
    bins, num_bins = pack(lengths, 4096)
    assert np.bincount(bins, lengths).max() <= 4096
    assert lengths.sum() / (num_bins * 4096) > 0.999


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("rows_multiple_of", [1, 8])
def test_every_document_is_in_exactly_one_row(packing, rows_multiple_of):
    documents = Documents(random_lengths(1))
    rows = PackedDataset(documents, 64, packing=packing, rows_multiple_of=rows_multiple_of)
    assert len(rows) % rows_multiple_of == 0
    seen = []
    for row in rows:
        assert sum(len(ids) for ids, _ in row) <= 64
        assert packing or len(row) <= 1
        seen += [int(ids[0]) for ids, _ in row]
    assert sorted(seen) == list(range(200))
    assert rows.fill == pytest.approx(documents.lengths.sum() / (len(rows) * 64))


def contents(rows: PackedDataset) -> list[list[int]]:
    return [rows.documents_of(row).tolist() for row in range(len(rows))]


def test_epochs_differ_but_repeat_and_keep_their_number_of_rows():
    # Few distinct lengths, so that equally long documents can swap rows.
    documents = Documents(np.random.default_rng(0).integers(1, 9, 400))
    rows = PackedDataset(documents, 64, seed=3)
    epochs = []
    for epoch in range(3):
        rows.set_epoch(epoch)
        epochs.append(contents(rows))
    assert len({len(epoch) for epoch in epochs}) == 1
    assert epochs[0] != epochs[1] != epochs[2]
    sets = [{frozenset(row) for row in epoch} for epoch in epochs]
    assert sets[0] != sets[1]  # not only the order changes
    again = PackedDataset(documents, 64, seed=3)
    again.set_epoch(2)
    assert contents(again) == epochs[2]
    assert contents(PackedDataset(documents, 64, seed=4)) != epochs[0]


def test_rows_past_the_end():
    rows = PackedDataset(Documents([5]), 64, rows_multiple_of=4)
    assert [len(row) for row in rows] == [1, 0, 0, 0]
    with pytest.raises(IndexError):
        rows[4]
    with pytest.raises(ValueError, match="rows_multiple_of is 0"):
        PackedDataset(Documents([5]), 64, rows_multiple_of=0)


def test_pickles():
    rows = PackedDataset(Documents(random_lengths(2)), 64, seed=1)
    rows.set_epoch(5)
    copy = pickle.loads(pickle.dumps(rows))
    assert contents(copy) == contents(rows)

from __future__ import annotations

import numpy as np
import pytest

from qwen3_sft.packing.passes import STRATUM, Passes
from qwen3_sft.packing.rows import PackedDataset
from tests.packing.test_rows import Documents, random_lengths


def passes(lengths, repeats, *, seed=0):
    """Sources take the documents in turn."""
    source_of = np.arange(len(lengths)) % len(repeats)
    return Passes(np.asarray(lengths), source_of, repeats, seed), source_of


@pytest.mark.parametrize("share", [0.5, 1 / 3, 0.3, 0.07, 0.01, 1.5, 2.0, 2.93, 7.4])
def test_a_source_is_passed_over_as_often_as_it_says(share):
    lengths, epochs = random_lengths(1, 3000), 120
    plan, source_of = passes(lengths, [1.0, share])
    drawn = [plan.documents(epoch) for epoch in range(epochs)]
    taken = np.bincount(np.concatenate(drawn), minlength=len(lengths))
    assert set(taken[source_of == 0]) == {epochs}
    sizes = {int((source_of[documents] == 1).sum()) for documents in drawn}
    assert sizes == {round(share * 1500)}
    of_source = taken[source_of == 1]
    assert of_source.mean() == pytest.approx(share * epochs, rel=0.01)
    # Strata round their sizes, and a last turn may be begun.
    spread = epochs * min(share, 8 / STRATUM) / 2 + 1
    assert np.abs(of_source - share * epochs).max() <= spread


def test_halves_of_two_epochs_are_the_whole():
    plan, _ = passes(random_lengths(2, 640), [0.5])
    both = np.concatenate([plan.documents(0), plan.documents(1)])
    assert sorted(both.tolist()) == list(range(640))


@pytest.mark.parametrize("count", [1, 5, 63, 64, 65, 1000])
@pytest.mark.parametrize("share", [0.9, 0.5, 1.2])
def test_every_turn_fits_its_slot(count, share):
    lengths = random_lengths(3, count)
    plan, _ = passes(lengths, [share])
    for epoch in range(9):
        documents = plan.documents(epoch)
        assert len(documents) == len(plan.lengths)
        assert (lengths[documents] <= plan.lengths).all()


def test_slots_are_tight():
    """The waste is the spread of lengths within a stratum."""
    lengths = random_lengths(4, 5000, 4096)
    plan, _ = passes(lengths, [0.5])
    used = sum(lengths[plan.documents(epoch)].sum() for epoch in range(4)) / 4
    assert used / plan.lengths.sum() > 0.98


def test_seeds_give_other_turns_and_the_same_seed_the_same():
    lengths = random_lengths(5, 200)
    first, same, other = (passes(lengths, [0.3], seed=s)[0].documents(3) for s in (1, 1, 2))
    assert first.tolist() == same.tolist()
    assert sorted(first.tolist()) != sorted(other.tolist())


def test_packed_rows_hold_the_documents_of_their_epoch():
    lengths = random_lengths(6, 400)
    documents = Documents(lengths)
    plan, _ = passes(lengths, [2.0, 0.4])
    rows = PackedDataset(documents, 100, seed=7, rows_multiple_of=4, passes=plan)
    sizes = set()
    for epoch in (0, 1, 5, 1):
        rows.set_epoch(epoch)
        sizes.add(len(rows))
        found = [int(ids[0]) for row in range(len(rows)) for ids, _ in rows[row]]
        assert sorted(found) == sorted(plan.documents(epoch).tolist())
        room = [sum(len(ids) for ids, _ in rows[row]) for row in range(len(rows))]
        assert max(room) <= 100
        assert rows.fill == pytest.approx(sum(room) / (100 * len(rows)))
    assert len(sizes) == 1


def test_one_pass_over_everything_changes_nothing():
    lengths = random_lengths(8, 300)
    plain = PackedDataset(Documents(lengths), 90, seed=3)
    planned = PackedDataset(Documents(lengths), 90, seed=3, passes=passes(lengths, [1.0, 1.0])[0])
    for epoch in range(3):
        plain.set_epoch(epoch)
        planned.set_epoch(epoch)
        for row in range(len(plain)):
            assert plain.documents_of(row).tolist() == planned.documents_of(row).tolist()

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from qwen3_sft.packing.collator import BatchStats, PackedCollator
from tests.support.oracle import assert_close

L, PAD = 32, 7


def random_rows(seed: int, num_rows: int = 3, vocab: int = 1000):
    """Rows that are full, partly filled, and (the last) empty."""
    rng = np.random.default_rng(seed)
    rows = []
    for fill in [L, *rng.integers(1, L, num_rows - 2).tolist()]:
        cuts = np.sort(rng.choice(np.arange(1, fill), min(3, fill - 1), replace=False))
        lengths = np.diff([0, *cuts.tolist(), fill])
        rows.append(
            [(rng.integers(0, vocab, n).astype(np.int32), rng.random(n) < 0.5) for n in lengths]
        )
    return [*rows, []]


def slow_collate(rows):
    """One token at a time: (id, label, position, real, first position of its segment)."""
    flat = []
    for row in rows:
        used = 0
        for ids, trained in row:
            start = len(flat)
            for position, (token, is_trained) in enumerate(zip(ids, trained, strict=True)):
                label = int(token) if is_trained and position > 0 else -100
                flat.append((int(token), label, position, True, start))
            used += len(ids)
        start = len(flat)
        flat += [(PAD, -100, position, False, start) for position in range(L - used)]
    return [list(column) for column in zip(*flat, strict=True)]


@pytest.mark.parametrize("seed", range(20))
def test_batch_equals_the_slow_definition(seed):
    rows = random_rows(seed, num_rows=2 + seed % 4)
    batch = PackedCollator(L, PAD)(rows)
    ids, labels, positions, real, starts = slow_collate(rows)
    assert batch["input_ids"].tolist() == [ids]
    assert batch["labels"].tolist() == [labels]
    assert batch["position_ids"].tolist() == [positions]
    assert batch["token_mask"].tolist() == [real]
    boundaries = [*sorted(set(starts)), len(rows) * L]
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == boundaries
    longest = max(np.diff(boundaries).tolist())
    assert batch["max_length_q"] == batch["max_length_k"] == longest
    targets = [(i - 1, label) for i, label in enumerate(labels) if label != -100]
    found = zip(batch["label_positions"].tolist(), batch["label_targets"].tolist(), strict=True)
    assert list(found) == targets
    documents = [len(ids) for row in rows for ids, _ in row]
    assert batch["stats"] == BatchStats(
        tokens=sum(documents),
        label_tokens=len(targets),
        padded_tokens=len(rows) * L - sum(documents),
        sequences=len(documents),
        sum_length_squared=sum(n * n for n in documents),
    )


def test_dtypes_and_static_shapes():
    batch = PackedCollator(L, PAD)(random_rows(0))
    for name in ("input_ids", "labels", "position_ids"):
        assert batch[name].dtype == torch.int64
        assert batch[name].shape == (1, 3 * L)
    assert batch["token_mask"].dtype == torch.bool
    assert batch["cu_seq_lens_q"].dtype == batch["cu_seq_lens_k"].dtype == torch.int32
    assert batch["label_positions"].dtype == batch["label_targets"].dtype == torch.int64
    assert "attention_mask" not in batch


def test_stats_are_python_integers_that_add_up_and_pickle():
    batch = PackedCollator(L, PAD)(random_rows(0))
    stats = batch["stats"]
    values = [getattr(stats, name) for name in stats.__slots__]
    assert all(type(value) is int for value in values)
    assert pickle.loads(pickle.dumps(stats)) == stats
    total = stats + stats
    assert [getattr(total, name) for name in total.__slots__] == [2 * value for value in values]


def test_only_empty_rows():
    batch = PackedCollator(L, PAD)([[], []])
    assert batch["stats"] == BatchStats(0, 0, 2 * L, 0, 0)
    assert batch["cu_seq_lens_q"].tolist() == [0, L, 2 * L]
    assert (batch["labels"] == -100).all()


def test_refuses_a_row_that_is_too_long():
    document = (np.zeros(L + 1, np.int32), np.ones(L + 1, bool))
    with pytest.raises(ValueError, match="33 tokens in 1 documents, 1 more than max_length 32"):
        PackedCollator(L, PAD)([[document]])


@torch.no_grad()
def test_documents_do_not_see_each_other(tiny_moe):
    rows = random_rows(1, vocab=tiny_moe.config.vocab_size)
    batch = PackedCollator(L, PAD)(rows)
    packed = tiny_moe(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
    ).logits
    separate_nll = 0.0
    starts = iter(batch["cu_seq_lens_q"].tolist())
    for row in rows:
        for ids, trained in row:
            start = next(starts)
            tokens = torch.from_numpy(ids).long()[None]
            logits = tiny_moe(input_ids=tokens, use_cache=False).logits
            difference = packed[:, start : start + len(ids)] - logits
            assert difference.abs().max() <= 1e-5
            labels = tokens[0].masked_fill(~torch.from_numpy(trained), -100)
            separate_nll += F.cross_entropy(logits[0, :-1], labels[1:], reduction="sum")
        if sum(len(ids) for ids, _ in row) < L:
            next(starts)  # the padding of this row
    assert next(starts) == packed.shape[1]
    hidden = packed[0, batch["label_positions"]]
    packed_nll = F.cross_entropy(hidden, batch["label_targets"], reduction="sum")
    assert_close(packed_nll[None], separate_nll[None], name="sum of NLL", rms=1e-6)
    shifted = F.cross_entropy(packed[0, :-1], batch["labels"][0, 1:], reduction="sum")
    assert_close(shifted[None], packed_nll[None], name="labels against label_positions", rms=1e-6)

"""Synthetic documents with the lengths of real ones, and their batches.

Two layouts. `flat`: all rows one after the other, (1, R * L), with cumulative lengths, as a run
trains. `rows`: (R, L), as transformers batches, for its sdpa and eager attention, whose mask would
be R times as large over the flat row: (R * L)^2 instead of R * L^2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from parts.step.options import StepOptions

from qwen3_sft.packing.collator import PackedCollator
from qwen3_sft.packing.rows import Document

SIGMA = 0.9  # of the logarithm of a document's length
_POOL = 1 << 20


def document_lengths(options: StepOptions, num_rows: int) -> np.ndarray:
    """Return the tokens of each document, (n,) int64, enough for `num_rows` rows.

    `fixed`: a row each. `packed`: log-normal with mean `document_tokens`, cut to 8 and
    `max_length`; without packing one per row.
    """
    if options.lengths == "fixed":
        return np.full(num_rows, options.max_length, np.int64)
    mu = math.log(options.document_tokens) - SIGMA**2 / 2
    rng = np.random.default_rng(0)
    if not options.packing:
        return _cut(rng.lognormal(mu, SIGMA, num_rows), options.max_length)
    wanted, lengths = num_rows * options.max_length, np.empty(0, np.int64)
    while lengths.sum() < wanted:
        more = rng.lognormal(mu, SIGMA, 1 + 2 * wanted // options.document_tokens)
        lengths = np.concatenate([lengths, _cut(more, options.max_length)])
    return lengths[: int(np.searchsorted(np.cumsum(lengths), wanted)) + 1]


def _cut(lengths: np.ndarray, max_length: int) -> np.ndarray:
    return np.clip(lengths.astype(np.int64), 8, max_length)


class RandomDocuments:
    """Documents of uniform random tokens; two thirds of their tokens carry labels.

    They are slices of one pool: reading one costs as little as from a token cache.
    """

    def __init__(self, lengths: np.ndarray, vocabulary: int) -> None:
        self.lengths = lengths
        size = max(_POOL, 2 * int(lengths.max()))
        self.pool = np.random.default_rng(1).integers(0, vocabulary, size, dtype=np.int32)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Document:
        length = int(self.lengths[index])
        start = index * 7919 % (len(self.pool) - length)
        return self.pool[start : start + length], np.arange(length) >= length // 3


class RowsCollator:
    """The batch of `PackedCollator` as (R, L) for transformers' own attention.

    Packed rows are told apart by position_ids, rows of one document by a padding mask.
    """

    def __init__(self, max_length: int, *, packing: bool) -> None:
        self.flat = PackedCollator(max_length, 0)
        self.max_length = max_length
        self.packing = packing

    def __call__(self, rows: Sequence[Sequence[Document]]) -> dict[str, Any]:
        """Build the batch; the loss's indices refer to the flattened (R * L) positions."""
        batch = self.flat(rows)
        for name in ("input_ids", "labels", "position_ids", "token_mask"):
            batch[name] = batch[name].view(len(rows), -1)
        for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"):
            del batch[name]
        if not self.packing:
            del batch["position_ids"]
            batch["attention_mask"] = batch["token_mask"].long()
        return batch


def layout_of(attention: str) -> str:
    """Return `rows` for the attention that needs a mask, `flat` for kernels that do not."""
    return "rows" if attention in ("sdpa", "eager") else "flat"


def collator_of(options: StepOptions, attention: str) -> PackedCollator | RowsCollator:
    """Return what batches the rows for an attention implementation."""
    if layout_of(attention) == "rows":
        return RowsCollator(options.max_length, packing=options.packing)
    return PackedCollator(options.max_length, 0)


def length_facts(lengths: np.ndarray) -> dict[str, float]:
    """Return the mean length, and the mean weighted by length, which sets attention's work."""
    total = int(lengths.sum())
    return {
        "documents": len(lengths),
        "mean_tokens": round(total / len(lengths), 1),
        "length_weighted_mean_tokens": round(float((lengths**2).sum()) / total, 1),
    }

"""Rows of documents -> one packed sequence of static shape, with all that attention and loss need.

There is no attention mask on purpose: transformers isolates the documents by position ids (or by
cu_seq_lens in the flash kernels) only while no mask is given; an all-ones mask silently lets every
document see the ones before it. What is left of a row is one document of padding, so that no
document crosses the end of its row and the cumulative lengths end at T.

Shapes: R rows of L = max_length tokens, T = R * L, S documents (padding included), N labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from qwen3_sft.chat.samples import IGNORED
from qwen3_sft.packing.rows import Document


@dataclass(frozen=True, slots=True)
class BatchStats:
    """What a batch holds, as Python integers, so that counting never waits for the device.

    Attributes:
        tokens: tokens of documents, padding excluded.
        label_tokens: tokens with a label.
        padded_tokens: tokens of padding.
        sequences: documents, padding excluded.
        sum_length_squared: sum over documents of length^2, the unit of causal attention's work.
    """

    tokens: int
    label_tokens: int
    padded_tokens: int
    sequences: int
    sum_length_squared: int

    def __add__(self, other: BatchStats) -> BatchStats:
        return BatchStats(
            self.tokens + other.tokens,
            self.label_tokens + other.label_tokens,
            self.padded_tokens + other.padded_tokens,
            self.sequences + other.sequences,
            self.sum_length_squared + other.sum_length_squared,
        )


class PackedCollator:
    """Turn R rows, each a list of (ids, trained), into one batch of R * max_length tokens.

    The batch has: `input_ids` (1, T) int64; `labels` (1, T) int64, unshifted as Hugging Face models
    take them, -100 where nothing is learnt and at each document's first token; `position_ids`
    (1, T) int64, from 0 in each document; `cu_seq_lens_q`, `cu_seq_lens_k` (S + 1,) int32;
    `max_length_q`, `max_length_k` int; `label_positions` (N,) int64 with `label_targets` (N,)
    int64: the hidden state at a position predicts its target, so that the loss selects by index
    rather than by a mask whose size the GPU would have to report; `token_mask` (1, T) bool, False
    on padding; `stats`, a `BatchStats`.
    """

    def __init__(self, max_length: int, pad_token_id: int) -> None:
        self.max_length = max_length
        self.pad_token_id = pad_token_id

    def __call__(self, rows: Sequence[Sequence[Document]]) -> dict[str, Any]:
        """Build the batch.

        Raises:
            ValueError: if the documents of a row have more than `max_length` tokens.
        """
        lengths, is_padding = self._segments(rows)
        token_mask = np.repeat(~is_padding, lengths)
        ends = np.cumsum(lengths)
        starts = ends - lengths
        input_ids, labels = self._tokens(rows, token_mask)
        labels[starts] = IGNORED  # the token before it belongs to another document
        label_positions = np.flatnonzero(labels != IGNORED) - 1
        cu_seq_lens = torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32))
        max_length = int(lengths.max(initial=0))
        return {
            "input_ids": torch.from_numpy(input_ids)[None],
            "labels": torch.from_numpy(labels)[None],
            "position_ids": torch.from_numpy(_positions(starts, lengths))[None],
            "cu_seq_lens_q": cu_seq_lens,
            "cu_seq_lens_k": cu_seq_lens,
            "max_length_q": max_length,
            "max_length_k": max_length,
            "label_positions": torch.from_numpy(label_positions),
            "label_targets": torch.from_numpy(labels[label_positions + 1]),
            "token_mask": torch.from_numpy(token_mask)[None],
            "stats": _stats(lengths, is_padding, len(label_positions)),
        }

    def _tokens(
        self, rows: Sequence[Sequence[Document]], token_mask: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return input_ids and labels, both (T,) int64; documents lie where `token_mask` is."""
        input_ids = np.full(len(token_mask), self.pad_token_id, np.int64)
        labels = np.full_like(input_ids, IGNORED)
        documents = [document for row in rows for document in row]
        if documents:
            ids = np.concatenate([ids for ids, _ in documents])
            trained = np.concatenate([trained for _, trained in documents])
            input_ids[token_mask] = ids
            labels[token_mask] = np.where(trained, ids, IGNORED)
        return input_ids, labels

    def _segments(self, rows: Sequence[Sequence[Document]]) -> tuple[np.ndarray, np.ndarray]:
        """Return lengths (S,) int64 of documents and paddings in order, and which are padding."""
        lengths: list[int] = []
        is_padding: list[bool] = []
        for row in rows:
            of_row = [len(ids) for ids, _ in row]
            rest = self.max_length - sum(of_row)
            if rest < 0:
                raise ValueError(
                    f"a row has {sum(of_row)} tokens in {len(of_row)} documents, "
                    f"{-rest} more than max_length {self.max_length}: pack with the same max_length"
                )
            lengths += [*of_row, rest] if rest else of_row
            is_padding += [False] * len(of_row) + [True] * bool(rest)
        return np.array(lengths, np.int64), np.array(is_padding, bool)


def _positions(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return 0, 1, ... anew in each segment, (T,) int64."""
    return np.arange(lengths.sum()) - np.repeat(starts, lengths)


def _stats(lengths: np.ndarray, is_padding: np.ndarray, label_tokens: int) -> BatchStats:
    documents = lengths[~is_padding]
    return BatchStats(
        tokens=int(documents.sum()),
        label_tokens=label_tokens,
        padded_tokens=int(lengths[is_padding].sum()),
        sequences=len(documents),
        sum_length_squared=int(np.square(documents).sum()),
    )

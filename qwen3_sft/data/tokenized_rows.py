"""What tokenising some rows gives, as it is made and as it is sent between processes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qwen3_sft.chat.encoding import Proof
from qwen3_sft.data.choose_rows import ChosenRow
from qwen3_sft.data.counts import Counts
from qwen3_sft.data.token_store import PackedSamples


@dataclass(frozen=True, slots=True)
class TokenizedSample:
    """One document: ids (n,) int32, trained (n,) bool, and where it came from."""

    row: int
    location: str
    ids: np.ndarray
    trained: np.ndarray


@dataclass(frozen=True, slots=True)
class TokenizedRows:
    """The samples of some rows, in order, what became of all rows, and what is to be checked.

    Attributes:
        chosen: rows to compare with the chat template.
        proof: texts, and the ids that they got, to compare with the tokenizer.
    """

    samples: list[TokenizedSample]
    counts: Counts
    chosen: list[ChosenRow]
    proof: list[Proof]

    def packed(self) -> PackedSamples:
        """Return the samples end to end."""
        samples = self.samples
        return PackedSamples(
            np.concatenate([*(sample.ids for sample in samples), np.empty(0, np.int32)]),
            np.concatenate([*(sample.trained for sample in samples), np.empty(0, bool)]),
            np.array([len(sample.ids) for sample in samples], np.int64),
            np.array([sample.row for sample in samples], np.int64),
            np.array([np.count_nonzero(sample.trained) for sample in samples], np.int64),
        )


@dataclass(frozen=True, slots=True)
class PackedRows:
    """`TokenizedRows` whose samples are packed: quick to send from one process to another."""

    samples: PackedSamples
    counts: Counts
    chosen: list[ChosenRow]
    proof: list[Proof]

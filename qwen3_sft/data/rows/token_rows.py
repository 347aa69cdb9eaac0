"""Rows that came tokenised: `input_ids`, with labels or masks of the same length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from qwen3_sft.chat.samples import IGNORED, Dropped, Tokens
from qwen3_sft.data.rows.defects import NO_TOKENS, ONE_TOKEN
from qwen3_sft.data.rows.fields import account, refuse_boundaries
from qwen3_sft.data.rows.loss_flags import BY_FLAG, row_flag
from qwen3_sft.data.rows.source import Source
from qwen3_sft.data.rows.values import describe

_MASKS = ("loss_mask", "assistant_masks", "completion_mask")  # 1: the token is learned
_FLAGS = ("weight", "sample_weight", "train")
_HANDLED = frozenset(
    {"input_ids", "labels", "attention_mask", "position_ids", "token_type_ids", *_MASKS, *_FLAGS}
)


def parse_tokens(
    row: Mapping[str, Any], source: Source, vocab_size: int | None
) -> Tokens | Dropped:
    """Check the tokens of a row.

    Args:
        row: its columns.
        source: its location.
        vocab_size: token ids must be below it.

    Raises:
        DataError: for ids outside of the vocabulary, labels that are shifted or of another length,
            masks that contradict them, padding inside.
    """
    ids = _int_array(row.get("input_ids"), "input_ids", source)
    refuse_boundaries(row, source)
    account(row, _HANDLED, "", "", source)
    _refuse_lists(row, len(ids), source)
    labels = _labels(row, ids, source)
    ids, labels = _without_padding(row, ids, labels, source)
    if len(ids) < 2:
        return ONE_TOKEN if len(ids) else NO_TOKENS
    if ids.min() < 0 or (vocab_size is not None and ids.max() >= vocab_size):
        bad = ids[(ids < 0) | (ids >= (vocab_size or np.inf))][0]
        source.fail(f"input_ids has token {bad}, outside the vocabulary of {vocab_size} tokens")
    _check_labels(ids, labels, source)
    if not row_flag({name: row[name] for name in _FLAGS if name in row}, source):
        return BY_FLAG
    return Tokens(ids.astype(np.int32), labels.astype(np.int32))


def _refuse_lists(row: Mapping[str, Any], count: int, source: Source) -> None:
    """Raise for a column with an entry per token, which may say what is learned of each."""
    for name in row.keys() - _HANDLED:
        value = row[name]
        if isinstance(value, list | tuple | np.ndarray) and len(value) == count > 0:
            source.fail(
                f"column {name!r} has an entry per token, whose meaning is unknown; labels are "
                "read from labels or loss_mask, each document from a row of its own: rename it, "
                "or name it in --ignore_columns"
            )


def _labels(row: Mapping[str, Any], ids: np.ndarray, source: Source) -> np.ndarray:
    labels = ids if row.get("labels") is None else _array_like(row, "labels", ids, source)
    for name in (name for name in _MASKS if name in row):
        mask = _array_like(row, name, ids, source)
        if not np.isin(mask, (0, 1)).all():
            source.fail(f"{name} has values other than 0 and 1; labels are on or off")
        masked = np.where(mask == 1, ids, IGNORED)
        if "labels" in row and ((labels[1:] == IGNORED) != (masked[1:] == IGNORED)).any():
            source.fail(f"labels and {name} say different things; keep one")
        labels = masked if "labels" not in row else labels
    return labels


def _without_padding(
    row: Mapping[str, Any], ids: np.ndarray, labels: np.ndarray, source: Source
) -> tuple[np.ndarray, np.ndarray]:
    """Cut what the attention mask calls padding, which stands at the ends."""
    if "position_ids" in row:
        positions = _array_like(row, "position_ids", ids, source)
        if (np.diff(positions) != 1).any() and "attention_mask" not in row:
            source.fail("position_ids restart: give each document a row of its own")
    if "attention_mask" not in row:
        return ids, labels
    there = np.flatnonzero(_array_like(row, "attention_mask", ids, source))
    if not len(there):
        return ids[:0], labels[:0]
    first, last = there[0], there[-1] + 1
    if last - first != len(there):
        source.fail("attention_mask has zeros inside; give each document a row of its own")
    outside = np.concatenate([labels[:first], labels[last:]])
    if "labels" in row and (outside != IGNORED).any():
        source.fail(f"labels has labels on padding (attention_mask 0); set them to {IGNORED}")
    return ids[first:last], labels[first:last]


def _check_labels(ids: np.ndarray, labels: np.ndarray, source: Source) -> None:
    wrong = np.flatnonzero((labels != IGNORED) & (labels != ids))
    if len(wrong):
        source.fail(
            f"labels[{wrong[0]}] is {labels[wrong[0]]} but input_ids[{wrong[0]}] is "
            f"{ids[wrong[0]]}; a label is its own token or {IGNORED} (do not shift labels)"
        )
    # The first token of a document is never predicted, whatever its label.
    if (labels[1:] == IGNORED).all():
        source.fail(f"all labels are {IGNORED}, so there is nothing to learn; remove the row")


def _array_like(row: Mapping[str, Any], column: str, ids: np.ndarray, source: Source) -> np.ndarray:
    array = _int_array(row[column], column, source)
    if len(array) != len(ids):
        source.fail(f"{column} has {len(array)} entries but input_ids has {len(ids)}")
    return array


def _int_array(value: Any, column: str, source: Source) -> np.ndarray:
    if not isinstance(value, list | tuple | np.ndarray):
        source.fail(f"column {column!r} must be a list of integers, found {describe(value)}")
    if not len(value):
        return np.empty(0, np.int64)
    is_mask = column.endswith("mask") or column == "assistant_masks"
    if isinstance(value, np.ndarray):
        whole = value.ndim == 1 and value.dtype.kind in ("iub" if is_mask else "iu")
    else:
        types = (int, bool) if is_mask else (int,)
        whole = all(type(item) in types or isinstance(item, np.integer) for item in value)
    if not whole:
        source.fail(f"column {column!r} must hold only integers, found {describe(value)}")
    try:
        return np.asarray(value, np.int64)
    except OverflowError as error:
        source.fail(f"column {column!r} has an integer that is no token id: {error}")

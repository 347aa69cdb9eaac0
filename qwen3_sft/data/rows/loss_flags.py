"""Flags that say which answers are learned: per message, per row, and lists over the messages.

A flag is 0 or 1. Labels are on or off, here as in the stored tokens and the loss, so a fraction
would be a promise that nothing keeps: it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qwen3_sft.chat.samples import Dropped
from qwen3_sft.data.rows.source import Source

_LEARN = (
    "weight", "train", "loss", "loss_weight", "loss_mask", "loss_scale", "training", "trainable",
    "is_trainable", "should_train", "learn", "supervise", "calculate_loss", "compute_loss",
)  # fmt: skip
_MASK = ("masked", "mask", "ignore_loss", "no_loss", "skip_loss", "is_masked")
_ROW = ("weight", "sample_weight", "loss_weight", "example_weight", "train", "training", "loss")
_LISTS = ("message_loss_mask", "loss_mask", "loss_masks", "train_mask", "turn_mask", "weights")

MESSAGE_FLAGS = frozenset({*_LEARN, *_MASK})
ROW_FLAGS = frozenset({*_ROW, *_LISTS, "mask"})
BY_FLAG = Dropped("no label by its own loss flags")  # asked for: no defect of the data
_SPELLED = {"0": False, "1": True, "false": False, "true": True, "0.0": False, "1.0": True}


def message_flag(fields: Mapping[str, Any], where: str, source: Source) -> bool | None:
    """Return whether a message is learned, None where it does not say.

    Raises:
        DataError: for a value that is neither 0 nor 1, and for flags that contradict each other.
    """
    said = {
        name: _flag(fields[name], f"{where} {name}", source) for name in _LEARN if name in fields
    }
    for name in _MASK:
        if name in fields:
            said[name] = not _flag(fields[name], f"{where} {name}", source)
    return _agreed(said, fields, where, source)


def row_flag(row: Mapping[str, Any], source: Source) -> bool:
    """Return whether a row is learned.

    Raises:
        DataError: as `message_flag`.
    """
    said = {name: _flag(row[name], f"column {name!r}", source) for name in _ROW if name in row}
    return _agreed(said, row, "the row", source) is not False


def message_mask(row: Mapping[str, Any], count: int, source: Source) -> list[bool] | None:
    """Return the row's list of flags, one per message, None where it has none.

    Args:
        row: its columns.
        count: messages of the row.
        source: for errors.

    Raises:
        DataError: for a list of another length, for other values, and for two that differ.
    """
    found: tuple[str, list[bool]] | None = None
    for name in _LISTS:
        if name not in row:
            continue
        value = row[name]
        if not isinstance(value, list | tuple) or len(value) != count:
            length = f"{len(value)} entries" if isinstance(value, Sequence) else repr(value)[:40]
            source.fail(
                f"column {name!r} must have one 0 or 1 per message ({count}), found {length}"
            )
        flags = [_flag(v, f"{name}[{index}]", source) for index, v in enumerate(value)]
        if found and found[1] != flags:
            source.fail(f"columns {found[0]!r} and {name!r} differ; keep one")
        found = name, flags
    if "mask" in row and str(row["mask"]).lower() not in ("user", "human"):
        source.fail(
            f"column 'mask' is {row['mask']!r}: the role without labels must be the user; remove "
            "it or set --ignore_columns mask"
        )
    return found[1] if found else None


def is_masking(name: str, value: Any) -> bool:
    """Whether a field is a flag, by its name, that does not say to learn all."""
    if value is None or not (name in MESSAGE_FLAGS or name in ROW_FLAGS):
        return False
    learned = (0, "0", "false") if name in _MASK else (1, "1", "true")
    values = value if isinstance(value, list | tuple) else [value]
    return any((v.strip().lower() if isinstance(v, str) else v) not in learned for v in values)


def _flag(value: Any, what: str, source: Source) -> bool:
    spelled = _SPELLED.get(value.strip().lower()) if isinstance(value, str) else None
    is_number = isinstance(value, bool | int | float) and value in (0, 1)
    if spelled is None and not is_number:
        source.fail(
            f"{what} is {value!r}, but labels are on or off: set it to 1 or 0, or name the field "
            "in --ignore_columns"
        )
    return bool(value) if spelled is None else spelled


def _agreed(
    said: Mapping[str, bool], fields: Mapping[str, Any], where: str, source: Source
) -> bool | None:
    if len(set(said.values())) > 1:
        named = " and ".join(f"{name}: {fields[name]!r}" for name in said)
        source.fail(f"{where} has {named}, which contradict each other; keep one")
    return next(iter(said.values()), None)

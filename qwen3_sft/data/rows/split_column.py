"""A row's own word for its split: what is named for a test reaches training only when asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen3_sft.data.files.splits import TEST, VALIDATION, usual_name
from qwen3_sft.data.rows.source import Source


def check_split(row: Mapping[str, Any], source: Source) -> None:
    """Raise for a row of a validation or test split where another one is read.

    Raises:
        DataError: names both.
    """
    told, asked = row.get("split"), source.reading.split
    if not isinstance(told, str) or asked is None or told == asked:
        return
    of_row, wanted = usual_name(told.strip()), usual_name(asked)
    if of_row != wanted and of_row in (VALIDATION, TEST):
        source.fail(
            f"column 'split' is {told!r}, and {asked} is what is read; keep the rows of each split "
            "in a file of its own, or set --ignore_columns split"
        )

"""A list of messages, or the string that holds one, as CSV files and data frames keep them."""

from __future__ import annotations

import re
from typing import Any

from qwen3_sft.data.rows.source import Source
from qwen3_sft.data.rows.values import load_json

ROLE_KEYS = ("role", "from")
# A list of messages, as JSON or as Python prints it: an object begins it and has a role.
_TURNS_TEXT = re.compile(
    r"""\s*\[\s*\{\s*(?=["'](?:role|from|content|value)["']\s*:).*?["'](?:role|from)["']\s*:""",
    re.DOTALL,
)


def decoded_turns(value: Any, where: str, source: Source) -> Any:
    """Return the list of messages that a string holds, as CSV has them; else the value itself.

    Raises:
        DataError: a string that begins as such a list cannot be read.
    """
    if not isinstance(value, str) or not _TURNS_TEXT.match(value):
        return value
    decoded = load_json(value, where, source)
    return decoded if is_turns(decoded) else value


def is_turns(value: Any) -> bool:
    """Whether a value is a list of messages, and no list of parts of one."""
    return isinstance(value, list | tuple) and any(
        isinstance(item, dict) and any(key in item for key in ROLE_KEYS) for item in value
    )

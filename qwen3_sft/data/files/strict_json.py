"""JSON values that say one thing only: no key twice, and not nested without end.

Python's reader keeps the last of two equal keys, so what the first one says would be lost in
silence. Keys are counted against the text, which takes a tenth of the time of looking at each pair;
where the counts differ, and a text that spells `":` differs too, the pairs tell.
"""

from __future__ import annotations

import ast
import json
from typing import Any

_DEEPEST = 100  # levels; chat templates, which walk values too, end in an error below 600
_KEY, _QUOTED = '":', '\\":'


def check_value(value: Any, text: str, start: int = 0, end: int | None = None) -> None:
    """Raise if a value has lost a key, or is nested too deeply.

    Args:
        value: decoded from `text[start:end]`.
        text: JSON.
        start: of the value in it.
        end: of the value in it; None is the end of the text.

    Raises:
        ValueError: says which key.
    """
    end = len(text) if end is None else end
    if count_keys(value) != text.count(_KEY, start, end) - text.count(_QUOTED, start, end):
        json.loads(text[start:end], object_pairs_hook=_unique)


def count_keys(value: Any, depth: int = 0) -> int:
    """Return how many keys the objects in a value have.

    Raises:
        ValueError: it is nested too deeply.
    """
    if depth > _DEEPEST:
        raise ValueError(f"nested more than {_DEEPEST} levels deep; flatten it")
    if isinstance(value, dict):
        count, items = len(value), value.values()
    else:
        count, items = 0, value
    for item in items:
        if isinstance(item, dict | list | tuple | set):
            count += count_keys(item, depth + 1)
    return count


def python_value(text: str) -> Any:
    """Return a list or dict in Python's spelling, as `str()` and pandas write it, else None.

    Raises:
        ValueError: a key occurs twice, or it is nested too deeply.
    """
    if not text.lstrip().startswith(("{", "[")):
        return None
    try:
        tree = ast.parse(text.strip(), mode="eval")
        value = ast.literal_eval(tree)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            _unique([(ast.literal_eval(key), None) for key in node.keys if key is not None])
    count_keys(value)
    return value


def _unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    kept = dict(pairs)
    if len(kept) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"an object has the key {twice!r} twice; keep one")
    return kept

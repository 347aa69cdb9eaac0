"""JSON values that say one thing only: no key twice, and not nested without end.

Python's reader keeps the last of two equal keys, so what the first one says would be lost in
silence.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from typing import Any, NoReturn

_DEEPEST = 100  # levels; chat templates, which walk values too, end in an error below 600


class StrictDecoder:
    """Decodes JSON; a value that lost a key, or is nested too deeply, is told after its end."""

    def __init__(self, parse_constant: Callable[[str], NoReturn] | None = None) -> None:
        """Make a decoder.

        Args:
            parse_constant: called for NaN and infinities, as of `json.JSONDecoder`.
        """
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object, parse_constant=parse_constant
        )
        self._twice: list[Any] = []

    def decode(self, text: str) -> Any:
        """Return the one value in a text.

        Raises:
            ValueError: broken JSON (`JSONDecodeError`), or as `check`.
            RecursionError: as `json.loads`.
        """
        self._twice = []
        value = self._decoder.decode(text)
        self.check(value, text, 0, len(text))
        return value

    def raw_decode(self, text: str, start: int) -> tuple[Any, int]:
        """Return the value that begins at `start`, which is to be checked, and where it ends.

        Raises:
            ValueError: broken JSON (`JSONDecodeError`).
            RecursionError: as `json.loads`.
        """
        self._twice = []
        return self._decoder.raw_decode(text, start)

    def check(self, value: Any, text: str, start: int, end: int) -> None:
        """Raise for the value that was decoded last, from `text[start:end]`.

        Raises:
            ValueError: says which key is there twice, or that it is nested too deeply.
        """
        _refuse_twice(self._twice)
        if text.count("{", start, end) + text.count("[", start, end) > _DEEPEST:
            check_depth(value)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        kept = dict(pairs)
        if len(kept) != len(pairs):
            self._twice = self._twice or [key for key, _ in pairs]
        return kept


def check_depth(value: Any, depth: int = 0) -> None:
    """Raise for a value of lists and dicts that is nested too deeply.

    Raises:
        ValueError: it is.
    """
    if depth > _DEEPEST:
        raise ValueError(f"nested more than {_DEEPEST} levels deep; flatten it")
    for item in value.values() if isinstance(value, dict) else value:
        if isinstance(item, dict | list | tuple | set):
            check_depth(item, depth + 1)


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
            _refuse_twice([ast.literal_eval(key) for key in node.keys if key is not None])
    check_depth(value)
    return value


def _refuse_twice(keys: list[Any]) -> None:
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"an object has the key {twice!r} twice; keep one")

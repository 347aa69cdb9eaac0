"""Which nulls of a file stand for keys that are absent.

Arrow gives every struct the union of all rows' keys and fills in null, in Parquet files and in the
JSON that is written from them alike. A null of a message or of a row always means absent, since
nothing there can be null. In call arguments and tool results a null may be data; there the other
rows of the file tell. Arrow fills in every row, so a key that only some have was written by a
person, and so was its null. In a tool's schema only a default or an example can be.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_TURNS = ("messages", "conversations", "conversation", "prompt", "completion")
_FREE = frozenset({"default", "const", "example", "examples", "enum"})  # values, not schemas


@dataclass(frozen=True, slots=True)
class Fillers:
    """Where null means absent.

    Attributes:
        everywhere: every message of the file has the same keys, some of them null: Arrow's work.
        paths: key paths, such as ``arguments.day``, that every call has and most have null.
    """

    everywhere: bool = False
    paths: frozenset[str] = frozenset()

    def without(self, value: Any, path: str, *, from_text: bool = False) -> Any:
        """Return a JSON value without the nulls that mean absent.

        Args:
            value: as read; lists keep their nulls, which Arrow never adds.
            path: ``arguments``, ``result`` or ``tools``.
            from_text: it was parsed from a string of the file, into which Arrow cannot write.
        """
        if isinstance(value, list):
            return [self.without(item, path, from_text=from_text) for item in value]
        if not isinstance(value, dict):
            return value
        return {
            key: self.without(item, f"{path}.{key}", from_text=from_text)
            for key, item in value.items()
            if item is not None or not self._is_filler(f"{path}.{key}", from_text=from_text)
        }

    def _is_filler(self, path: str, *, from_text: bool) -> bool:
        return path in self.paths or (self.everywhere and not from_text)

    def schema(self, value: Any, *, from_text: bool, is_fields: bool = False) -> Any:
        """Return a tool description without the nulls that mean absent.

        Args:
            value: the description, or a part of it.
            from_text: as for `without`.
            is_fields: the keys are names of parameters, none of them a keyword.
        """
        if isinstance(value, list):
            return [self.schema(item, from_text=from_text) for item in value]
        if not isinstance(value, dict):
            return value
        kept: dict[str, Any] = {}
        for key, item in value.items():
            if key in _FREE and not is_fields:
                if item is not None or not self._is_filler(f"tools.{key}", from_text=from_text):
                    kept[key] = self.without(item, f"tools.{key}", from_text=from_text)
            elif item is not None:
                is_names = key in ("properties", "$defs", "definitions") and not is_fields
                kept[key] = self.schema(item, from_text=from_text, is_fields=is_names)
        return kept


NO_FILLERS = Fillers()


def find_fillers(rows: Iterable[Mapping[str, Any]]) -> Fillers:
    """Read off the rows of one file where null means absent.

    Args:
        rows: the first rows, as read.
    """
    keys: dict[str, set[frozenset[str]]] = {}
    has_null = False
    structs, having, empty = Counter[str](), Counter[str](), Counter[str]()
    for column, turn in _turns(rows):
        keys.setdefault(column, set()).add(frozenset(turn))
        has_null |= None in turn.values()
        for path, value in _open_values(turn):
            _count(value, path, structs, having, empty)
    uniform = bool(keys) and all(len(kinds) == 1 for kinds in keys.values())
    paths = frozenset(
        path for path, nulls in empty.items()
        if having[path] == structs[path.rpartition(".")[0]] > 1 and 2 * nulls >= having[path]
    )  # fmt: skip
    return Fillers(uniform and has_null, paths)


def _turns(rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for row in rows:
        for column in _TURNS:
            turns = row.get(column)
            for turn in turns if isinstance(turns, list) else ():
                if isinstance(turn, dict):
                    yield column, turn


def _open_values(turn: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield (path, value) of what a person may have filled with anything."""
    calls = turn.get("tool_calls")
    for call in [*(calls if isinstance(calls, list) else ()), turn.get("function_call")]:
        function = (call.get("function") or call) if isinstance(call, dict) else None
        if isinstance(function, dict):
            yield "arguments", _parsed(function.get("arguments"))
    content = turn.get("content")
    if isinstance(content, dict):
        yield "result", content
    for part in content if isinstance(content, list) else ():
        if isinstance(part, dict) and part.get("type") == "tool_use":
            yield "arguments", part.get("input")


def _parsed(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments)
    except ValueError:
        return None  # an error once the row is read


def _count(
    value: Any, path: str, structs: Counter[str], having: Counter[str], empty: Counter[str]
) -> None:
    if isinstance(value, list):
        for item in value:
            _count(item, path, structs, having, empty)
    if not isinstance(value, dict):
        return
    structs[path] += 1
    for key, item in value.items():
        having[f"{path}.{key}"] += 1
        empty[f"{path}.{key}"] += item is None
        _count(item, f"{path}.{key}", structs, having, empty)

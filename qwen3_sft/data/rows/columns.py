"""What a file calls its columns, as the formats call them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen3_sft.data.rows.fields import account
from qwen3_sft.data.rows.source import Source
from qwen3_sft.data.rows.values import load_json
from qwen3_sft.errors import DataError

# Known names in lower case; a file may write them with capitals.
_KNOWN = frozenset(
    {"messages", "conversations", "conversation", "prompt", "completion", "text", "instruction",
     "input", "output", "response", "query", "question", "answer", "system", "system_prompt",
     "tools", "functions", "history", "context", "user", "assistant", "human"}
)  # fmt: skip
_REQUESTS = ("body", "request", "params")  # one line of a batch of requests to a server
_PREFIX = "message."
_LIST_TEXT = re.compile(r"\s*\[\s*\{")


@dataclass(frozen=True, slots=True)
class NamedColumns:
    """Renames the columns of a row, and unwraps requests to a server.

    Attributes:
        columns: name in the file -> name of a format.
        keys: the same for the keys of messages.
    """

    columns: Mapping[str, str]
    keys: Mapping[str, str]

    def __call__(self, row: dict[str, Any], location: str) -> dict[str, Any]:
        """Return the row under the names of the formats.

        Raises:
            DataError: the new name of a column is taken.
        """
        if self.columns:
            row = self._renamed(row, location)
        if any(name in row for name in _REQUESTS) or isinstance(row.get("response"), dict):
            row = _unwrapped(row, Source(location))
        if not row.keys() <= _KNOWN:
            row = _in_lower_case(row)
        return self._with_keys(row, Source(location)) if self.keys else row

    def _renamed(self, row: dict[str, Any], location: str) -> dict[str, Any]:
        for old, new in self.columns.items():
            if old in row and new in row and new not in self.columns:
                raise DataError(
                    f"{location}: --columns {new}={old}, but the row has a column {new!r} too; set "
                    f"--columns {new}={old} unused={new} --ignore_columns unused"
                )
        return {self.columns.get(name, name): value for name, value in row.items()}

    def check_found(self, rows: list[dict[str, Any]], name: str) -> None:
        """Raise for a column that no row has, under either of its names.

        Args:
            rows: of one source, as read.
            name: of the source.

        Raises:
            DataError: names the column and those that there are.
        """
        if rows:
            columns = {column for row in rows for column in row}
            _check_there(self.columns, columns, name, "column", "")
        values = [value for row in rows for value in row.values()]
        if values and not any(self._holds_messages(value) for value in values):
            lists = [value for value in values if isinstance(value, list)]
            keys = {key for items in lists for m in items if isinstance(m, dict) for key in m}
            _check_there(self.keys, keys, name, "key of messages", _PREFIX)

    def _with_keys(self, row: dict[str, Any], source: Source) -> dict[str, Any]:
        return {name: self._column(value, name, source) for name, value in row.items()}

    def _column(self, value: Any, name: str, source: Source) -> Any:
        if self._holds_messages(value):
            value = load_json(value, f"column {name!r}", source)
        if not isinstance(value, list):
            return value
        return [self._message(m, f"{name}[{index}]", source) for index, m in enumerate(value)]

    def _holds_messages(self, value: Any) -> bool:
        """Whether a value is a string that holds a list of objects with one of the keys."""
        is_list = isinstance(value, str) and _LIST_TEXT.match(value)
        return bool(is_list) and any(f"{q}{key}{q}" in value for key in self.keys for q in "'\"")

    def _message(self, item: Any, where: str, source: Source) -> Any:
        if not isinstance(item, dict):
            return item
        for old, new in self.keys.items():
            if None not in (item.get(old), item.get(new)) and new not in self.keys:
                source.fail(
                    f"{where}: --columns message.{new}={old}, but the message has a key {new!r} "
                    f"too; set --columns message.{new}={old} message.unused={new} --ignore_columns "
                    "message.unused"
                )
        moved = {new for old, new in self.keys.items() if old in item}
        return {
            self.keys.get(name, name): value
            for name, value in item.items()
            if name in self.keys or name not in moved
        }


def named_columns(pairs: Sequence[str]) -> NamedColumns:
    """Read `--columns prompt=question message.content=utterance`.

    Raises:
        DataError: a pair without an equals sign, or a name that occurs twice.
    """
    columns: dict[str, str] = {}
    keys: dict[str, str] = {}
    for pair in pairs:
        new, equals, old = pair.partition("=")
        if not (new and equals and old):
            raise DataError(f"--columns {pair}: write KNOWN=NAME, such as prompt=question")
        kept, new = (keys, new.removeprefix(_PREFIX)) if new.startswith(_PREFIX) else (columns, new)
        old = old.removeprefix(_PREFIX) if kept is keys else old
        if old in kept or new in kept.values():
            raise DataError(f"--columns {pair}: one of its names occurs twice")
        kept[old] = new
    return NamedColumns(columns, keys)


def _check_there(
    names: Mapping[str, str], there: Collection[str], source: str, what: str, prefix: str
) -> None:
    for old, new in names.items():
        if old not in there and new not in there:
            raise DataError(
                f"{source}: --columns {prefix}{new}={old}, but its first rows have no {what} "
                f"{old!r}; they have {', '.join(sorted(map(str, there)))}"
            )


def _in_lower_case(row: dict[str, Any]) -> dict[str, Any]:
    names = {name: name.strip().lower() for name in row if isinstance(name, str)}
    changed = {
        name: low for name, low in names.items()
        if low != name and low in _KNOWN and low not in row and [*names.values()].count(low) == 1
    }  # fmt: skip
    return {changed.get(name, name): value for name, value in row.items()} if changed else row


def _unwrapped(row: dict[str, Any], source: Source) -> dict[str, Any]:
    """Return the conversation of a request to a server, with the answer if that is there too."""
    wraps = [name for name in _REQUESTS if isinstance(row.get(name), dict)]
    request = row[wraps[0]] if wraps else {}
    if not isinstance(request.get("messages"), list):
        answer = row.get("response")
        if isinstance(answer, dict) and ("body" in answer or "choices" in answer):
            source.fail(
                "a server's answer without its request; join the two files by custom_id, so that a "
                "row has the request's messages and the answer"
            )
        return row
    outer = {name: v for name, v in row.items() if name not in (*wraps, "response", "error")}
    if row.get("error"):
        source.fail(f"the server answered this request with an error: {str(row['error'])[:80]}")
    messages = [*request["messages"], *_answers(row.get("response"), source)]
    return {**outer, **request, "messages": messages}


def _answers(response: Any, source: Source) -> list[Any]:
    if response is None:
        return []
    body = response.get("body", response) if isinstance(response, dict) else None
    choices = body.get("choices") if isinstance(body, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or "message" not in choices[0]:
        source.fail("the server's response must have one choice with a message")
    account(choices[0], ("message",), "response choice", "call.", source)
    return [choices[0]["message"]]

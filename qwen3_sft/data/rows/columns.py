"""What a file calls its columns, as the formats call them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen3_sft.data.rows.fields import account
from qwen3_sft.data.rows.source import Source
from qwen3_sft.errors import DataError

# Known names in lower case; a file may write them with capitals.
_KNOWN = frozenset(
    {"messages", "conversations", "conversation", "prompt", "completion", "text", "instruction",
     "input", "output", "response", "query", "question", "answer", "system", "system_prompt",
     "tools", "functions", "history", "context", "user", "assistant", "human"}
)  # fmt: skip
_REQUESTS = ("body", "request", "params")  # one line of a batch of requests to a server
_PREFIX = "message."


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
        return self._with_keys(row) if self.keys else row

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
        there = {column for row in rows for column in row}
        for old, new in self.columns.items() if rows else ():
            if old not in there and new not in there:
                raise DataError(
                    f"{name}: --columns {new}={old}, but its first rows have no column {old!r}; "
                    f"they have {', '.join(sorted(map(str, there)))}"
                )

    def _with_keys(self, row: dict[str, Any]) -> dict[str, Any]:
        return {
            name: [self._message(item) for item in value] if isinstance(value, list) else value
            for name, value in row.items()
        }

    def _message(self, item: Any) -> Any:
        if not isinstance(item, dict):
            return item
        return {self.keys.get(name, name): value for name, value in item.items()}


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

"""A raw row of any accepted format becomes a canonical sample.

The format is read off a row's keys, and every row of a file must have the same one. A row that
cannot be trained on raises a DataError that begins with its location; a row with nothing in it is
returned as `Dropped` with the reason, for the reader to count. No row is ever skipped in silence,
and no field of a row: `rows/fields.py` has the table.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from functools import lru_cache
from typing import Any, Literal, get_args

from qwen3_sft.chat.samples import Dropped, Sample
from qwen3_sft.data.rows.conversations import make_conversation, parse_tool_columns
from qwen3_sft.data.rows.plain import parse_prompt_completion, parse_text
from qwen3_sft.data.rows.questions import ALPACA, PAIRS, parse_alpaca, parse_pair
from qwen3_sft.data.rows.refused import not_supervised
from qwen3_sft.data.rows.source import Reading, Source
from qwen3_sft.data.rows.split_column import check_split
from qwen3_sft.data.rows.token_rows import parse_tokens
from qwen3_sft.data.turns import parse_turns
from qwen3_sft.errors import DataError

Format = Literal[
    "messages", "sharegpt", "alpaca", "question_answer", "prompt_completion", "text", "tokens"
]

# A row has a format when it has all of the columns of one of its entries.
_REQUIRED: dict[Format, tuple[frozenset[str], ...]] = {
    "messages": (frozenset({"messages"}),),
    "sharegpt": (frozenset({"conversations"}), frozenset({"conversation"})),
    "alpaca": tuple(map(frozenset, ALPACA)),
    "prompt_completion": (frozenset({"prompt", "completion"}),),
    "text": (frozenset({"text"}),),
    "tokens": (frozenset({"input_ids"}),),
    "question_answer": tuple(map(frozenset, PAIRS)),
}
_DATA_COLUMNS = frozenset(
    [*(column for kinds in _REQUIRED.values() for kind in kinds for column in kind), "input"]
)
# Names so common that another format's columns may hold them too, as copies or references.
_WEAK: tuple[Format, ...] = ("question_answer",)
_ACCEPTED = (
    "messages | conversations (ShareGPT), both with optional tools, system | "
    "instruction + output (Alpaca), with optional input, system, history | "
    "question + answer, query + response and the like | "
    "prompt + completion | text | input_ids, with optional labels; other names can be mapped, such "
    "as --columns prompt=question completion=answer"
)


def detect_format(columns: Collection[str], location: str, wanted: Format | None = None) -> Format:
    """Return the format of a row with these columns.

    Args:
        columns: the row's keys; columns that belong to no format are ignored.
        location: where the row stands, for the error message.
        wanted: the user's choice among several that fit.

    Raises:
        DataError: when no format fits, the wanted one does not, or more than one does.
    """
    names = frozenset(columns)
    found = _fitting(names)
    if wanted is not None:
        if wanted not in found:
            kinds = _REQUIRED[wanted]
            needs = " or ".join("+".join(sorted(kind)) for kind in kinds)
            missing = ", ".join(sorted(kinds[0] - names)) if len(kinds) == 1 else needs
            raise DataError(
                f"{location}: --dataset_format {wanted} needs the column {missing}; "
                f"found {sorted(names)}"
            )
        return wanted
    if len(found) == 1:
        return found[0]
    if not found:
        if problem := not_supervised(names):
            raise DataError(f"{location}: {problem}")
        raise DataError(
            f"{location}: columns {sorted(names)} are no known format; accepted: {_ACCEPTED}"
        )
    named = " and ".join(
        "+".join(sorted(kind)) for name in found for kind in _REQUIRED[name] if kind <= names
    )
    raise DataError(
        f"{location}: columns {named} could each be the data; choose with --dataset_format "
        f"{' or '.join(found)}, or keep only one of them"
    )


def is_known(columns: Collection[str]) -> bool:
    """Whether a row with these columns has some format."""
    return bool(_fitting(frozenset(columns)))


@lru_cache(1024)
def _fitting(names: frozenset[str]) -> tuple[Format, ...]:
    fits = [name for name in get_args(Format) if any(kind <= names for kind in _REQUIRED[name])]
    strong = [name for name in fits if name not in _WEAK]
    return tuple(strong or fits)


def require_format(file_format: Format, row_format: Format, location: str) -> None:
    """Raise a DataError when a row's format is not its file's."""
    if row_format != file_format:
        raise DataError(
            f"{location}: this row is {row_format!r} but the file began as {file_format!r}; "
            "put each format in a file of its own"
        )


def parse_row(
    row: dict[str, Any],
    fmt: Format,
    location: str,
    warnings: Counter[str],
    *,
    vocab_size: int | None = None,
    reading: Reading = Reading(),  # noqa: B008 - frozen
) -> Sample | Dropped:
    """Turn one raw row into a canonical sample.

    Args:
        row: column name to value.
        fmt: what `detect_format` found for it.
        location: such as ``data.jsonl:17``; every error begins with it.
        warnings: receives one count per kind of oddity that is kept.
        vocab_size: token ids of a pre-tokenised row must be below it.
        reading: how the rows of its file are read.

    Returns:
        The sample, or `Dropped` with the reason to count.

    Raises:
        DataError: for a row that cannot be trained on.
    """
    source = Source(location, warnings, reading)
    given, row = row, source.kept(row)
    if any(type(value) is str and not value for value in row.values()):
        # A blank cell of a table says nothing, unless it is the data.
        row = {n: v for n, v in row.items() if n in _DATA_COLUMNS or type(v) is not str or v}
    check_split(row, source)
    if reading.is_chosen:  # columns of other formats are none of its data
        others = _others_columns(fmt, frozenset(row))
        row = {name: v for name, v in row.items() if name not in others}
    if fmt in ("messages", "sharegpt"):
        return _parse_conversation(given, row, source)
    if fmt == "alpaca":
        return parse_alpaca(given, row, source)
    if fmt == "question_answer":
        return parse_pair(given, row, source)
    if fmt == "prompt_completion":
        return parse_prompt_completion(given, row, source)
    if fmt == "text":
        return parse_text(given, row, source)
    return parse_tokens(row, source, vocab_size)


def _others_columns(fmt: Format, names: frozenset[str]) -> frozenset[str]:
    """Return the columns of the whole formats that were not chosen and are not its own."""
    found = {
        name: frozenset[str]().union(*(kind for kind in kinds if kind <= names))
        for name, kinds in _REQUIRED.items()
    }
    own = found.pop(fmt) | ({"input"} if fmt == "alpaca" else set())
    return frozenset[str]().union(*found.values()) - own


def _parse_conversation(
    given: dict[str, Any], row: dict[str, Any], source: Source
) -> Sample | Dropped:
    columns = [name for name in ("messages", "conversations", "conversation") if name in given]
    column = next((name for name in columns if name in row), columns[0])
    described = parse_tool_columns(row, source)
    tools = described[0][1] if described else ()
    turns = parse_turns(given[column], column, source, tools)
    return make_conversation(row, turns, (column,), source)

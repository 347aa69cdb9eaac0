"""A raw row of any accepted format becomes a canonical sample.

The format is read off a row's keys, and every row of a file must have the same one. A row that
cannot be trained on raises a DataError that begins with its location; a row with nothing in it is
returned as `Dropped` with the reason, for the reader to count. No row is ever skipped in silence.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from typing import Any, Literal, get_args

import numpy as np

from qwen3_sft.chat.samples import (
    IGNORED,
    Conversation,
    Dropped,
    Message,
    PlainText,
    Sample,
    Source,
    Tokens,
)
from qwen3_sft.data.turns import (
    check_order,
    check_text,
    clean_json,
    describe,
    join_parts,
    load_json,
    parse_answer,
    parse_turns,
    warn_control_text,
)
from qwen3_sft.errors import DataError

Format = Literal["messages", "sharegpt", "alpaca", "prompt_completion", "text", "tokens"]

# A row has a format when it has all of these columns.
_REQUIRED: dict[Format, frozenset[str]] = {
    "messages": frozenset({"messages"}),
    "sharegpt": frozenset({"conversations"}),
    "alpaca": frozenset({"instruction", "output"}),
    "prompt_completion": frozenset({"prompt", "completion"}),
    "text": frozenset({"text"}),
    "tokens": frozenset({"input_ids"}),
}
_ACCEPTED = (
    "messages | conversations (ShareGPT), both with optional tools, system | "
    "instruction + output (Alpaca), with optional input, system, history | "
    "prompt + completion | text | input_ids, with optional labels"
)
# Rendered chats: tokenising them as plain text would hide the turns from the masks.
_RENDERED = re.compile(r"<\|(?:im_start|im_end|endoftext)\|>")


def detect_format(columns: Collection[str], location: str, wanted: Format | None = None) -> Format:
    """Return the format of a row with these columns.

    Args:
        columns: the row's keys; columns that belong to no format are ignored.
        location: where the row stands, for the error message.
        wanted: the user's choice among several that fit.

    Raises:
        DataError: when no format fits, the wanted one does not, or more than one does.
    """
    if wanted is not None:
        if missing := _REQUIRED[wanted] - set(columns):
            raise DataError(
                f"{location}: --dataset_format {wanted} needs the column {', '.join(missing)}; "
                f"found {sorted(columns)}"
            )
        return wanted
    found = [name for name in get_args(Format) if _REQUIRED[name] <= set(columns)]
    if len(found) == 1:
        return found[0]
    if not found:
        raise DataError(
            f"{location}: columns {sorted(columns)} are no known format; accepted: {_ACCEPTED}"
        )
    named = " and ".join("+".join(sorted(_REQUIRED[name])) for name in found)
    raise DataError(
        f"{location}: columns {named} could each be the data; choose with --dataset_format "
        f"{' or '.join(found)}, or keep only one of them"
    )


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
    drop_nulls: bool = False,
) -> Sample | Dropped:
    """Turn one raw row into a canonical sample.

    Args:
        row: column name to value.
        fmt: what `detect_format` found for it.
        location: such as ``data.jsonl:17``; every error begins with it.
        warnings: receives one count per kind of oddity that is kept.
        vocab_size: token ids of a pre-tokenised row must be below it.
        drop_nulls: null entries of tools and call arguments mean absent; set it for rows from
            Arrow or Parquet, whose structs hold the union of all rows' keys.

    Returns:
        The sample, or `Dropped` with the reason to count.

    Raises:
        DataError: for a row that cannot be trained on.
    """
    source = Source(location, warnings, drop_nulls)
    if fmt == "messages":
        return _parse_conversation(row, "messages", source)
    if fmt == "sharegpt":
        return _parse_conversation(row, "conversations", source)
    if fmt == "alpaca":
        return _parse_alpaca(row, source)
    if fmt == "prompt_completion":
        return _parse_prompt_completion(row, source)
    if fmt == "text":
        text = _plain_text(row["text"], "text", source)
        return PlainText("", text) if text.strip() else Dropped("empty text")
    return _parse_tokens(row, source, vocab_size)


def _parse_conversation(row: dict[str, Any], column: str, source: Source) -> Conversation:
    messages = parse_turns(row[column], column, source)
    system = _parse_system(row, source)
    if system and messages and messages[0].role == "system":
        source.fail(f"column 'system' and {column}[0] are both system messages; keep one")
    check_order(messages, source)
    return Conversation(system + messages, _parse_tools(row, source))


def _parse_system(row: dict[str, Any], source: Source) -> tuple[Message, ...]:
    if row.get("system") is None or row["system"] == "":
        return ()
    text = join_parts(row["system"], "column 'system'", source)
    warn_control_text(text, source)
    return (Message("system", text),)


def _parse_tools(row: dict[str, Any], source: Source) -> tuple[dict[str, Any], ...]:
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        tools = load_json(tools, "column 'tools'", source)
    if not tools:
        return ()
    if not isinstance(tools, list):
        source.fail(f"column 'tools' must be a list of functions, found {describe(tools)}")
    return tuple(_parse_tool(tool, f"tools[{index}]", source) for index, tool in enumerate(tools))


def _parse_tool(tool: Any, where: str, source: Source) -> dict[str, Any]:
    if isinstance(tool, str):
        tool = load_json(tool, where, source)
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        source.fail(f"{where} must describe a function with a name, found {describe(tool)}")
    return clean_json(tool, where, source)


def _parse_alpaca(row: dict[str, Any], source: Source) -> Conversation | Dropped:
    if row["output"] == "":
        return Dropped("empty output")
    asked = [row["instruction"], *([row["input"]] if row.get("input") else [])]
    question = "\n".join(join_parts(part, "instruction or input", source) for part in asked)
    turns = [*_parse_history(row.get("history"), source), Message("user", question)]
    warn_control_text(question, source)
    turns.append(parse_answer(row["output"], "output", source))
    return Conversation((*_parse_system(row, source), *turns))


def _parse_history(history: Any, source: Source) -> list[Message]:
    """Parse earlier rounds: a list of [question, answer]."""
    if not isinstance(history or [], list):
        source.fail(f"column 'history' must be a list of pairs, found {describe(history)}")
    turns = []
    for index, pair in enumerate(history or []):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            source.fail(f"history[{index}] must be [question, answer], found {describe(pair)}")
        turns.append(Message("user", join_parts(pair[0], f"history[{index}][0]", source)))
        turns.append(parse_answer(pair[1], f"history[{index}][1]", source))
    return turns


def _parse_prompt_completion(
    row: dict[str, Any], source: Source
) -> Conversation | PlainText | Dropped:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        context = parse_turns(prompt, "prompt", source)
        answers = parse_turns(completion, "completion", source)
        check_order(context + answers, source)
        if all(message.role != "assistant" for message in answers):
            source.fail("completion has no assistant turn, so there is nothing to learn")
        return Conversation(context + answers, _parse_tools(row, source), len(context))
    if isinstance(prompt, list) or isinstance(completion, list):
        source.fail("prompt and completion must be both strings or both lists of messages")
    prompt = _plain_text(prompt, "prompt", source)
    completion = _plain_text(completion, "completion", source)
    if completion.lstrip().startswith("<think>"):
        source.fail("completion begins with <think>, a control token of chats; use `messages`")
    return PlainText(prompt, completion) if completion.strip() else Dropped("empty completion")


def _plain_text(value: Any, column: str, source: Source) -> str:
    if not isinstance(value, str):
        source.fail(f"column {column!r} must be a string, found {describe(value)}")
    rendered = _RENDERED.search(value)
    if rendered:
        source.fail(
            f"column {column!r} contains {rendered[0]}: it is already rendered as a chat; "
            "use `messages`, so that turns and masks are known"
        )
    warn_control_text(value, source)
    return check_text(value, f"column {column!r}", source)


def _parse_tokens(row: dict[str, Any], source: Source, vocab_size: int | None) -> Tokens | Dropped:
    ids = _int_array(row["input_ids"], "input_ids", source)
    if len(ids) < 2:
        return Dropped("one token, nothing to predict" if len(ids) else "empty input_ids")
    if ids.min() < 0 or (vocab_size is not None and ids.max() >= vocab_size):
        bad = ids[(ids < 0) | (ids >= (vocab_size or np.inf))][0]
        source.fail(f"input_ids has token {bad}, outside the vocabulary of {vocab_size} tokens")
    given = row.get("labels")
    labels = ids if given is None else _int_array(given, "labels", source)
    if len(labels) != len(ids):
        source.fail(f"labels has {len(labels)} entries but input_ids has {len(ids)}")
    wrong = np.flatnonzero((labels != IGNORED) & (labels != ids))
    if len(wrong):
        source.fail(
            f"labels[{wrong[0]}] is {labels[wrong[0]]} but input_ids[{wrong[0]}] is "
            f"{ids[wrong[0]]}; a label is its own token or {IGNORED} (do not shift labels)"
        )
    # The first token of a document is never predicted, whatever its label.
    if (labels[1:] == IGNORED).all():
        source.fail(f"all labels are {IGNORED}, so there is nothing to learn; remove the row")
    return Tokens(ids.astype(np.int32), labels.astype(np.int32))


def _int_array(value: Any, column: str, source: Source) -> np.ndarray:
    if not isinstance(value, list | tuple | np.ndarray):
        source.fail(f"column {column!r} must be a list of integers, found {describe(value)}")
    if not len(value):
        return np.empty(0, np.int64)
    if isinstance(value, np.ndarray):
        whole = value.ndim == 1 and value.dtype.kind in "iu"
    else:
        whole = all(type(item) is int or isinstance(item, np.integer) for item in value)
    if not whole:
        source.fail(f"column {column!r} must hold only integers, found {describe(value)}")
    try:
        return np.asarray(value, np.int64)
    except OverflowError as error:
        source.fail(f"column {column!r} has an integer that is no token id: {error}")

"""A question and its answer in columns of their own become a conversation: Alpaca and its kin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen3_sft.chat.samples import Conversation, Dropped, Message
from qwen3_sft.data.rows.answers import parse_answer, parse_call_turn
from qwen3_sft.data.rows.content import join_parts
from qwen3_sft.data.rows.conversations import make_conversation, parse_tool_columns
from qwen3_sft.data.rows.reasoning import REASONING_KEYS
from qwen3_sft.data.rows.source import Source
from qwen3_sft.data.rows.turn_lists import decoded_turns, is_turns
from qwen3_sft.data.rows.values import describe, load_json, warn_control_text
from qwen3_sft.data.turns import Turns, parse_turns

ALPACA = (("instruction", "output"), ("instruction", "response"))
PAIRS = (
    ("query", "response"), ("question", "answer"), ("question", "response"), ("prompt", "response"),
    ("input", "output"), ("user", "assistant"), ("human", "assistant"), ("instruction", "answer"),
    ("instruction", "completion"), ("query", "answers"),
)  # fmt: skip


def parse_alpaca(
    given: Mapping[str, Any], row: dict[str, Any], source: Source
) -> Conversation | Dropped:
    """Parse instruction, input or context, output or response, and earlier rounds.

    Raises:
        DataError: for a row that cannot be trained on.
    """
    answer = next(kind[1] for kind in ALPACA if kind[1] in given)
    columns = ["instruction", answer]
    more = [name for name in ("input", "context") if row.get(name)]
    if len(more) > 1:
        source.fail("the row has input and context beside its instruction; keep one")
    return _parse_question(given, row, columns, more, source)


def parse_pair(
    given: Mapping[str, Any], row: dict[str, Any], source: Source
) -> Conversation | Dropped:
    """Parse a question and an answer under any of the names of `PAIRS`.

    Raises:
        DataError: for a row that cannot be trained on.
    """
    fitting = [kind for kind in PAIRS if all(name in given for name in kind)]
    present = [kind for kind in fitting if all(name in row for name in kind)] or fitting
    if len(present) > 1:
        named = " and ".join("+".join(kind) for kind in present)
        source.fail(f"columns {named} could each be the data; name the others in --ignore_columns")
    return _parse_question(given, row, list(present[0]), [], source)


def _parse_question(
    given: Mapping[str, Any],
    row: dict[str, Any],
    columns: list[str],
    more: list[str],
    source: Source,
) -> Conversation | Dropped:
    ask, answer = columns
    asked = decoded_turns(given[ask], f"column {ask!r}", source)
    handled = {*columns, *REASONING_KEYS}
    if is_turns(asked):
        turns = parse_turns(asked, ask, source)
    else:
        handled |= {*more, "history"}
        turns = _parse_history(row.get("history"), source)
        parts = [(ask, asked), *((name, row[name]) for name in more)]
        question = "\n".join(
            join_parts(_one_text(part, name, source), name, source)
            for name, part in parts
            if part != ""
        )
        warn_control_text(question, source)
        if not question.strip():
            source.warn("empty user turn")
        turns.add(Message("user", question), turns.count)
        turns.count += 1
    row = _with_mode(row)
    described = parse_tool_columns(row, source)
    tools = described[0][1] if described else ()
    if answer == "answers":  # xLAM's: a list of calls
        message = parse_call_turn(row.get(answer), row, answer, source, tools=tools)
    else:
        said = _one_text(row[answer], answer, source) if answer in row else None
        message = parse_answer(said, row, answer, source, tools=tools)
    turns.add(message, turns.count)
    turns.count += 1
    return make_conversation(row, turns, handled, source)


def _one_text(value: Any, column: str, source: Source) -> Any:
    """Return a question or an answer; refuse a list of texts, which are several of it."""
    if isinstance(value, list | tuple) and any(isinstance(item, str) for item in value):
        source.fail(
            f"column {column!r} is a list of {len(value)} texts, and one is learned; write it as a "
            "string"
        )
    return value


def _with_mode(row: dict[str, Any]) -> dict[str, Any]:
    """Return the row with `reasoning: on` read as what it is, a switch and no reasoning."""
    switched = {
        name: row[name] for name in REASONING_KEYS
        if isinstance(row.get(name), bool) or str(row.get(name)).strip().lower() in ("on", "off")
    }  # fmt: skip
    if not switched:
        return row
    kept = {name: value for name, value in row.items() if name not in switched}
    return {**kept, "enable_thinking": next(iter(switched.values()))}


def _parse_history(history: Any, source: Source) -> Turns:
    """Parse earlier rounds: a list of [question, answer], or of messages."""
    if isinstance(history, str) and history.strip():
        history = load_json(history, "column 'history'", source)
    if not isinstance(history or [], list | tuple):
        source.fail(f"column 'history' must be a list of pairs, found {describe(history)}")
    if is_turns(history):
        return parse_turns(history, "history", source)
    turns = Turns()
    for index, pair in enumerate(history or []):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            source.fail(f"history[{index}] must be [question, answer], found {describe(pair)}")
        question = join_parts(pair[0], f"history[{index}][0]", source)
        turns.add(Message("user", question), turns.count)
        turns.add(parse_answer(pair[1], {}, f"history[{index}][1]", source), turns.count + 1)
        turns.count += 2
    return turns

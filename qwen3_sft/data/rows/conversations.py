"""Turns and the columns beside them become one conversation: system prompt, tools, mode, labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from qwen3_sft.chat.samples import Conversation, Dropped, Message
from qwen3_sft.data.rows.calls import Tools, agreed_tools, as_openai_tools, parse_tools
from qwen3_sft.data.rows.content import join_parts
from qwen3_sft.data.rows.defects import BLANK_ANSWER
from qwen3_sft.data.rows.fields import account
from qwen3_sft.data.rows.loss_flags import BY_FLAG, ROW_FLAGS, message_mask, row_flag
from qwen3_sft.data.rows.refused import prompt_alone
from qwen3_sft.data.rows.source import Source
from qwen3_sft.data.rows.values import describe, load_json, warn_control_text
from qwen3_sft.data.turns import Turns, check_order

SYSTEM_COLUMNS = ("system", "system_prompt", "system_message")
TOOL_COLUMNS = ("tools", "functions")
MODE_COLUMNS = ("enable_thinking", "chat_template_kwargs")
CHAT_COLUMNS = frozenset({*SYSTEM_COLUMNS, *TOOL_COLUMNS, *MODE_COLUMNS, *ROW_FLAGS})
# What a row of a conversation may hold a second time, for people who look at it.
_COPIES = (
    "prompt", "question", "problem", "query", "instruction", "input", "response", "answer",
    "solution", "output", "completion", "text",
)  # fmt: skip
_SWITCH = {"true": True, "false": False, "on": True, "off": False, "1": True, "0": False}


def parse_tool_columns(row: Mapping[str, Any], source: Source) -> list[tuple[str, Tools]]:
    """Return the tools of each column that describes some."""
    found = []
    for name in TOOL_COLUMNS:
        if row.get(name):
            tools = parse_tools(row[name], f"column {name!r}", source)
            found.append(
                (f"column {name!r}", as_openai_tools(tools) if name == "functions" else tools)
            )
    return found


def parse_system(row: Mapping[str, Any], source: Source) -> tuple[Message, ...]:
    """Return the system message that stands in a column of its own.

    Raises:
        DataError: two columns hold different ones.
    """
    found = {}
    for name in SYSTEM_COLUMNS:
        if row.get(name):
            found[name] = join_parts(row[name], f"column {name!r}", source)
    if len(set(found.values())) > 1:
        source.fail(f"columns {' and '.join(map(repr, found))} differ; keep one system prompt")
    for text in found.values():
        warn_control_text(text, source)
        return (Message("system", text),)
    return ()


def parse_mode(row: Mapping[str, Any], source: Source) -> bool | None:
    """Return what the row says about thinking at inference; None where it says nothing.

    Raises:
        DataError: for other arguments of a chat template, and for a value that is no switch.
    """
    modes: dict[str, bool] = {}
    if "enable_thinking" in row:
        modes["enable_thinking"] = as_switch(
            row["enable_thinking"], "column 'enable_thinking'", source
        )
    given = row.get("chat_template_kwargs")
    if isinstance(given, str) and given.strip():
        given = load_json(given, "column 'chat_template_kwargs'", source)
    if given:
        if not isinstance(given, dict):
            source.fail(f"column 'chat_template_kwargs' must be an object, found {describe(given)}")
        fields = source.kept(given, "chat_template_kwargs.")
        where = "column 'chat_template_kwargs'"
        account(fields, ("enable_thinking",), where, "chat_template_kwargs.", source)
        if "enable_thinking" in fields:
            modes[where] = as_switch(fields["enable_thinking"], f"{where} enable_thinking", source)
    if len(set(modes.values())) > 1:
        source.fail("enable_thinking and chat_template_kwargs contradict each other; keep one")
    return next(iter(modes.values()), None)


def as_switch(value: Any, what: str, source: Source) -> bool:
    """Return a value that is on or off.

    Raises:
        DataError: it is neither.
    """
    mode = _SWITCH.get(str(value).strip().lower())
    if mode is None:
        source.fail(f"{what} is {describe(value)}; set it to true or false")
    return mode


def make_conversation(
    row: Mapping[str, Any],
    turns: Turns,
    columns: Iterable[str],
    source: Source,
    *,
    first_trained: int = 0,
) -> Conversation | Dropped:
    """Put a conversation together, with every column of the row accounted for.

    Args:
        row: its columns, without nulls and ignored ones.
        turns: the messages.
        columns: that they were read from.
        source: the row's location.
        first_trained: index of the first message in `turns` that may be learned.

    Raises:
        DataError: for what cannot be trained on.
    """
    has_answer = any(message.role == "assistant" for message in turns.messages)
    if not has_answer and (problem := prompt_alone(row)):
        source.fail(problem)
    if more := row.keys() - CHAT_COLUMNS - set(columns):
        handled = row.keys() - more | set(_copies(row, turns.messages))
        account(row, handled, "", "", source)
    messages = tuple(turns.messages)
    system = parse_system(row, source)
    if system and messages and messages[0].role == "system":
        if system[0].content != messages[0].content:
            source.fail("column 'system' and the first message are both system messages; keep one")
        system = ()
    check_order(messages, source)
    if any(_is_blank(message) for message in messages):
        return BLANK_ANSWER
    masked = _masked(row, turns, source)
    answers = {i for i, message in enumerate(messages) if message.role == "assistant"}
    if not row_flag(row, source) or answers - {*range(first_trained)} <= masked:
        return BY_FLAG
    mode = parse_mode(row, source)
    if mode is False and any(message.reasoning for message in messages):
        source.fail("enable_thinking is false but an answer has reasoning; remove one of them")
    return Conversation(
        system + messages,
        agreed_tools([*parse_tool_columns(row, source), *turns.tools], source),
        first_trained + len(system) if first_trained else 0,
        frozenset(index + len(system) for index in masked),
        mode,
    )


def _is_blank(message: Message) -> bool:
    return message.role == "assistant" and not message.content.strip() and not message.tool_calls


def _copies(row: Mapping[str, Any], messages: list[Message]) -> list[str]:
    """Return columns whose text stands in a message too, so that nothing is lost with them."""
    names = [name for name in _COPIES if isinstance(row.get(name), str)]
    if not names:
        return names
    said = {text.strip() for m in messages for text in (m.content, m.written or m.content)}
    return [name for name in names if row[name].strip() in said]


def _masked(row: Mapping[str, Any], turns: Turns, source: Source) -> frozenset[int]:
    """Return the answers without labels, by the flags of the messages and the row's list."""
    mask = message_mask(row, turns.count, source)
    masked = set()
    for index, (message, origin) in enumerate(zip(turns.messages, turns.origins, strict=True)):
        flag = turns.flags[index]
        listed = None if mask is None else mask[origin]
        if message.role != "assistant":
            if listed and not any(
                other == origin and turns.messages[i].role == "assistant"
                for i, other in enumerate(turns.origins)
            ):
                source.fail(
                    f"the loss mask asks for labels on message {origin}, a {message.role} message, "
                    "and only answers are learned; set it to 0"
                )
            continue
        if None not in (flag, listed) and flag != listed:
            source.fail(f"message {origin} has a loss flag that contradicts the row's loss mask")
        if flag is False or listed is False:
            masked.add(index)
    return frozenset(masked)

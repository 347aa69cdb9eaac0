"""What a conversation has that chat templates treat apart, so that one of every kind is compared.

Two templates may agree on plain questions and differ on a tool's result, a null argument or a
second question. Rows that share all of this are written by the same branches of a template.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from qwen3_sft.chat.samples import Conversation, Message
from qwen3_sft.chat.text import is_query, last_query_index

Features = frozenset[str]


def features(conversation: Conversation) -> tuple[Features, Features]:
    """Return what to compare in every combination, and what to compare once at least.

    The second are the shapes of JSON values: data sets have too many sets of tools for all
    combinations of their shapes.
    """
    found = _of_turns(conversation.messages)
    values: set[str] = set()
    if conversation.tools:
        found.add("tools")
    if conversation.enable_thinking is not None:
        found.add(f"enable_thinking {conversation.enable_thinking}")
    for tool in conversation.tools:
        values.update(_of_value("tool", tool))
    for message in conversation.messages:
        if message.tool_calls:
            values.update(_of_calls(message))
    return frozenset(found), frozenset(values)


def _of_turns(messages: Sequence[Message]) -> set[str]:
    found: set[str] = set()
    last_query = last_query_index(messages)
    before, rounds = "nothing", 0
    for index, message in enumerate(messages):
        role, content = message.role, message.content
        found.add(_ORDERS[role, before])
        if not content:
            found.add(f"empty {role}")
        elif content[0].isspace() or content[-1].isspace():
            found.add(f"{role} with blanks around its text")
        if role == "assistant":
            _of_answer(message, found, in_round=index > last_query)
        elif role == "user":
            rounds += 1
            if not is_query(message):
                found.add("user who writes a tool's result")
        before = role
    if rounds > 1:
        found.add("several rounds")
    return found


_ROLES = ("system", "user", "assistant", "tool")
_ORDERS = {
    (role, before): f"{role} after {before}" for role in _ROLES for before in ("nothing", *_ROLES)
}


def _of_answer(message: Message, found: set[str], *, in_round: bool) -> None:
    if message.tool_calls:
        found.add("text before calls" if message.content else "calls without text")
        if len(message.tool_calls) > 1:
            found.add("several calls")
    if message.reasoning is not None:
        found.add("reasoning" if in_round else "reasoning in an earlier round")
        if message.written is not None:
            found.add("reasoning in the text")
    if "</think>" in message.content:
        found.add("</think> in an answer")


def _of_calls(message: Message) -> Iterator[str]:
    for call in message.tool_calls:
        for name, value in call.arguments.items():
            yield from _of_value("argument", value)
            if not name.isascii():
                yield "argument's name beyond ASCII"
        if not call.arguments:
            yield "call without arguments"


def _of_value(what: str, value: Any) -> Iterator[str]:
    """Yield what there is in a JSON value: kinds of values, and a tool's keys by their place."""
    yield f"{what} {type(value).__name__}"
    if isinstance(value, str):
        if not value.isascii():
            yield f"{what} text beyond ASCII"
        if not value.isalnum():
            yield f"{what} text with other signs"
    elif isinstance(value, dict):
        for key, item in value.items():
            inner = f"{what}.{key}" if what.count(".") < 3 and what.startswith("tool") else what
            # The names of parameters are the tool's own.
            yield from _of_value("tool.parameter" if what.endswith(".properties") else inner, item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _of_value(f"{what} in a list", item)

"""What a conversation has that chat templates treat apart, so that one of every kind is compared.

Two templates may agree on plain questions and differ on a tool's result, a null argument or a
second question. Rows that share all of this are written by the same branches of a template.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from qwen3_sft.chat.samples import Conversation, Message
from qwen3_sft.chat.text import is_query, last_query_index

Features = frozenset[str]


def features(conversation: Conversation) -> tuple[Features, Features]:
    """Return what to compare in every combination, and what to compare once at least.

    The second are the shapes of JSON values: data sets have too many sets of tools for all
    combinations of their shapes.
    """
    combined = {*_of_turns(conversation.messages), *_of_order(conversation.messages)}
    if conversation.tools:
        combined.add("tools")
    if conversation.enable_thinking is not None:
        combined.add(f"enable_thinking {conversation.enable_thinking}")
    return frozenset(combined), frozenset(_of_values(conversation))


def _of_turns(messages: Sequence[Message]) -> Iterator[str]:
    last_query = last_query_index(messages)
    for index, message in enumerate(messages):
        content = message.content
        if content != content.strip():
            yield f"{message.role} with blanks around its text"
        if message.role == "assistant":
            yield from _of_answer(message)
            if message.reasoning is not None:
                yield "reasoning" if index > last_query else "reasoning in an earlier round"
        elif message.role == "user":
            yield "user" if is_query(message) else "user who writes a tool's result"
        else:
            yield message.role if index or message.role != "system" else "system first"
        if not content:
            yield f"empty {message.role}"


def _of_answer(message: Message) -> Iterator[str]:
    yield "answer with calls" if message.tool_calls else "answer without calls"
    if message.tool_calls and message.content:
        yield "text before calls"
    if len(message.tool_calls) > 1:
        yield "several calls"
    if message.written is not None:
        yield "reasoning in the text"
    if "</think>" in message.content:
        yield "</think> in an answer"


def _of_order(messages: Sequence[Message]) -> Iterator[str]:
    for before, after in pairwise(messages):
        yield f"{after.role} after {before.role}"
    if sum(message.role == "user" for message in messages) > 1:
        yield "several rounds"
    if messages[0].role == "assistant":
        yield "assistant first"


def _of_values(conversation: Conversation) -> Iterator[str]:
    for message in conversation.messages:
        for call in message.tool_calls:
            for name, value in call.arguments.items():
                yield from _of_value("argument", value)
                if not name.isascii():
                    yield "argument's name beyond ASCII"
            if not call.arguments:
                yield "call without arguments"
    for tool in conversation.tools:
        yield from _of_value("tool", tool)


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

"""A list of message dicts, in any of the usual spellings, becomes canonical messages.

OpenAI's `role`/`content` and ShareGPT's `from`/`value` are read alike. Arrow and Parquet fill keys
that a message does not have with null, so a null key always counts as absent. What cannot be
trained on is an error with the place in the row; what is only odd is counted and kept.
"""

from __future__ import annotations

import json
import re
from itertools import pairwise
from typing import Any, NoReturn, cast

from qwen3_sft.chat.samples import Message, Role, Source, ToolCall

# The right column is what chat templates know. "function" is OpenAI's older name of "tool"; the
# last four are ShareGPT's.
_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
    "human": "user",
    "gpt": "assistant",
    "observation": "tool",
    "function_call": "assistant",
}
_KNOWN_KEYS = frozenset(
    {"role", "content", "from", "value", "tool_calls", "reasoning_content"}
    | {"name", "tool_call_id", "id"}  # for the serving side, no template shows them
)
_CONTROL_TEXT = re.compile(r"<\|[a-z_]+\|>|</?(?:tool_call|tool_response|think)>")


def check_text(text: str, where: str, source: Source) -> str:
    """Return `text`; raise on what no tokenizer can encode, count what is suspicious."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            source.fail(
                f"{where} has a lone surrogate {text[error.start]!a} at character {error.start}; "
                "it is half of an emoji or broken text: repair or remove it"
            )
    if "\0" in text:
        source.warn("NUL character")
    return text


def warn_control_text(text: str, source: Source) -> None:
    """Count text that spells a control token: it is encoded as plain text."""
    if "<" in text and _CONTROL_TEXT.search(text):
        source.warn("control-token text kept as plain text")


def load_json(text: str, where: str, source: Source) -> Any:
    """Parse a JSON string found inside a row."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except ValueError as error:
        source.fail(f"{where} is not valid JSON ({error}): {text[:80]!r}")


def clean_json(value: Any, where: str, source: Source) -> Any:
    """Check that a nested value can be written as JSON; leave out nulls where they mean absent."""
    if source.drop_nulls:
        value = _without_nulls(value)
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        source.fail(f"{where} cannot be written as JSON: {error}")
    check_text(text, where, source)
    return value


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def parse_turns(value: Any, column: str, source: Source) -> tuple[Message, ...]:
    """Parse a list of message dicts.

    Args:
        value: what the column holds.
        column: its name, for error messages.
        source: the row's location and counters.

    Raises:
        DataError: for a value that is no list of messages, an unknown role, missing content.
    """
    if not isinstance(value, list | tuple):
        source.fail(
            f"column {column!r} must be a list of messages, found {describe(value)}; "
            'write [{"role": "user", "content": "..."}, ...]'
        )
    return tuple(
        _parse_turn(turn, f"{column}[{index}]", source) for index, turn in enumerate(value)
    )


def describe(value: Any) -> str:
    """Name a value in an error message: its type, and its beginning."""
    if value is None:
        return "null"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def check_order(messages: tuple[Message, ...], source: Source) -> None:
    """Raise for a conversation that cannot be trained on, count odd orders of turns."""
    if not messages:
        source.fail("empty conversation: it has no messages")
    roles = [message.role for message in messages]
    if "assistant" not in roles:
        source.fail("no assistant turn, so there is nothing to learn; remove the row")
    answered = roles.index("assistant")
    if "tool" in roles[:answered]:
        source.fail(f"messages[{roles.index('tool')}] is a tool result before any assistant turn")
    if "system" in roles[1:]:
        source.warn("system message not first")
    if "user" not in roles[:answered]:
        source.warn("conversation starts with an assistant turn")
    for role in ("user", "assistant"):
        repeats = sum(a == b == role for a, b in pairwise(roles))
        source.warnings.update({f"two {role} turns in a row": repeats} if repeats else {})


def _parse_turn(turn: Any, where: str, source: Source) -> Message:
    if not isinstance(turn, dict):
        source.fail(f"{where} must be a message, found {describe(turn)}")
    present = {key: value for key, value in turn.items() if value is not None}
    for key in present.keys() - _KNOWN_KEYS:
        source.warn(f"message key {key!r} ignored")
    name, content = _role_and_content(present, where, source)
    if not isinstance(name, str) or name not in _ROLES:
        source.fail(
            f"{where} has role {name!r}; accepted are system, user, assistant, tool "
            "(ShareGPT: human, gpt, observation, function_call)"
        )
    role = _ROLES[name]
    if name == "function_call":
        return Message(role, "", None, parse_tool_calls(content, where, source))
    if role == "assistant":
        return parse_answer(
            content,
            where,
            source,
            reasoning=present.get("reasoning_content"),
            tool_calls=parse_tool_calls(present.get("tool_calls"), where, source),
        )
    if present.get("tool_calls"):
        source.fail(f"{where} is a {role} message with tool_calls; only an assistant calls tools")
    text = join_parts(content, f"{where} content", source)
    warn_control_text(text, source)
    if role == "user" and not text.strip():
        source.warn("empty user turn")
    return Message(role, text)


def _role_and_content(turn: dict[str, Any], where: str, source: Source) -> tuple[Any, Any]:
    openai, sharegpt = "role" in turn, "from" in turn
    if openai == sharegpt:
        source.fail(
            f"{where} needs either role and content or from and value, found keys {sorted(turn)}"
        )
    keys = ("role", "content") if openai else ("from", "value")
    return turn[keys[0]], turn.get(keys[1])


def join_parts(content: Any, where: str, source: Source) -> str:
    """Return the text of a content: a string, or a list of text parts written one after another."""
    if isinstance(content, str):
        return check_text(content, where, source)
    if not isinstance(content, list):
        source.fail(f"{where} must be a string, found {describe(content)}")
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else describe(part)
            source.fail(f"{where} has a part of type {kind!r}, but this is a text model")
        if not isinstance(part.get("text"), str):
            source.fail(f"{where} has a text part without text")
    return check_text("".join(part["text"] for part in content), where, source)


def parse_answer(
    content: Any,
    where: str,
    source: Source,
    *,
    reasoning: Any = None,
    tool_calls: tuple[ToolCall, ...] = (),
) -> Message:
    """Parse what an assistant says; a leading think block becomes its reasoning.

    Raises:
        DataError: for an answer with nothing to learn, or reasoning that is not clear-cut.
    """
    text = "" if content is None and tool_calls else join_parts(content, f"{where} content", source)
    inline, text = split_think(text, where, source)
    if reasoning is not None and not isinstance(reasoning, str):
        source.fail(f"{where} reasoning_content must be a string, found {describe(reasoning)}")
    if inline is not None and reasoning:
        source.fail(f"{where} has reasoning_content and a <think> block in its content; keep one")
    thought = check_text(inline or reasoning or "", f"{where} reasoning_content", source)
    if not text.strip() and not tool_calls:
        source.fail(f"{where} is an assistant turn with empty content; remove the row or the turn")
    if "<tool_call>" in text:
        source.warn("<tool_call> in an answer is plain text, use tool_calls")
    warn_control_text(text, source)
    return Message("assistant", text, thought if thought.strip() else None, tool_calls)


def split_think(text: str, where: str, source: Source) -> tuple[str | None, str]:
    """Split a leading ``<think>...</think>`` off an answer: (reasoning or None, answer).

    Raises:
        DataError: for a block that is not closed, and for a second block.
    """
    if text.count("<think>") > 1 and text.count("</think>") > 1:
        source.fail(f"{where} has two <think> blocks; an answer has at most one, at its start")
    if not text.lstrip().startswith("<think>"):
        if "</think>" in text:
            source.warn("</think> inside an answer kept as text")
        return None, text
    body, closed, answer = text.lstrip().removeprefix("<think>").partition("</think>")
    if not closed or "<think>" in body:
        source.fail(f"{where} opens <think> without closing it; add </think> after the reasoning")
    if "</think>" in answer:
        source.warn("</think> inside an answer kept as text")
    return body.strip("\n"), answer.lstrip("\n")


def parse_tool_calls(value: Any, where: str, source: Source) -> tuple[ToolCall, ...]:
    """Parse calls in OpenAI's nested or the flat form; a string is JSON, one dict is one call."""
    if isinstance(value, str):
        value = load_json(value, f"{where} tool_calls", source)
    calls = [value] if isinstance(value, dict) else value or []
    if not isinstance(calls, list):
        source.fail(f"{where} tool_calls must be a list, found {describe(value)}")
    return tuple(_parse_tool_call(call, where, source) for call in calls)


def _parse_tool_call(call: Any, where: str, source: Source) -> ToolCall:
    function = (call.get("function") or call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        source.fail(
            f"{where} has a tool call without a function name: {describe(call)}; "
            'write {"type": "function", "function": {"name": ..., "arguments": {...}}}'
        )
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = load_json(arguments, f"{where} arguments of {function['name']}", source)
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        source.fail(
            f"{where} arguments of {function['name']} must be an object, found "
            f"{describe(arguments)}"
        )
    name = check_text(function["name"], f"{where} function name", source)
    return ToolCall(name, cast(dict[str, Any], clean_json(arguments, where, source)))

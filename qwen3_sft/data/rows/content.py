"""The content of a message: a string, or a list of parts of which each is read or refused."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from qwen3_sft.chat.samples import ToolCall
from qwen3_sft.data.rows.calls import Tools, as_openai_tools, parse_tool_calls, parse_tools
from qwen3_sft.data.rows.fields import account
from qwen3_sft.data.rows.loss_flags import MESSAGE_FLAGS, message_flag
from qwen3_sft.data.rows.source import Source
from qwen3_sft.data.rows.values import check_json, check_text, describe

_TEXT = ("text", "input_text", "output_text", "string")
_THOUGHT = ("thinking", "reasoning", "reasoning_text", "thought", "think")
_CALL = ("tool_use", "tool_call", "tool_calls", "function_call")
_RESULT = ("tool_result", "tool_response", "function_call_output")
_TOOLS = ("tools", "functions")
# Where a part has its text, besides the key of its own type.
_KEYS = ("text", "value", "content")
_PARTS = frozenset(
    {*_TEXT, *_THOUGHT, *_CALL, *_RESULT, "refusal", "image", "image_url", "input_image", "audio",
     "input_audio", "video", "video_url", "file", "input_file", "document"}
)  # fmt: skip
_UNREAD = {
    "redacted_thinking": "reasoning that its provider has encrypted; remove the row",
    "refusal": "a refusal apart from the text; write it as text, or remove the row",
}


@dataclass(slots=True)
class Content:
    """What the parts of one message hold."""

    text: str = ""
    reasoning: str | None = None
    calls: tuple[ToolCall, ...] = ()
    results: list[str] = field(default_factory=list)
    tools: Tools = ()


def join_parts(content: Any, where: str, source: Source) -> str:
    """Return the text of a content: a string, or a list of text parts written one after another.

    Raises:
        DataError: for other values, and for parts that are no text.
    """
    if isinstance(content, str):
        return check_text(content, where, source)
    read = read_content(content, where, source)
    for what, found in (
        ("reasoning", read.reasoning), ("a tool call", read.calls), ("tools", read.tools),
        ("a tool result", read.results),
    ):  # fmt: skip
        if found:
            source.fail(f"{where} has a part that is {what}, which has no place there")
    return read.text


def read_content(content: Any, where: str, source: Source) -> Content:
    """Read a content of any kind.

    Raises:
        DataError: it is neither a string nor a list, or has a part that cannot be learned.
    """
    if isinstance(content, str):
        return Content(check_text(content, where, source))
    if not isinstance(content, list | tuple):
        source.fail(f"{where} must be a string, found {describe(content)}")
    read = Content()
    for index, part in enumerate(content):
        if isinstance(part, str):
            read.text += part
        elif part is not None:
            _read_part(read, part, f"{where}[{index}]", source)
    check_text(read.text, where, source)
    return read


def _read_part(read: Content, part: Any, where: str, source: Source) -> None:
    if not isinstance(part, dict):
        source.fail(f"{where} must be a part with a type, found {describe(part)}")
    part = source.kept(part, "part.")
    kind = part.get("type", "text" if "text" in part else None)
    if message_flag(part, where, source) is False:
        source.fail(
            f"{where} is a part without loss, but a message is learned as a whole; set the flag on "
            "the message"
        )
    handled = {"type", "id", *MESSAGE_FLAGS}
    if kind in _TEXT:
        read.text += _text_of(part, "text", where, handled, source)
    elif kind in _THOUGHT:
        read.reasoning = (read.reasoning or "") + _text_of(part, kind, where, handled, source)
    elif kind in _CALL:
        read.calls += _calls_of(part, kind, where, handled, source)
    elif kind in _RESULT:
        read.results.append(_result_of(part, where, handled, source))
    elif kind in _TOOLS:
        key = _key_of(part, kind, where, source)
        tools = parse_tools(part[key], where, source)
        read.tools += as_openai_tools(tools) if kind == "functions" else tools
        handled.add(key)
    elif kind in _UNREAD:
        source.fail(f"{where} is a part of type {kind!r}: {_UNREAD[kind]}")
    elif kind is None:
        source.fail(f'{where} is a part without a type, found {sorted(part)}; add "type": "text"')
    else:
        source.fail(f"{where} is a part of type {kind!r}, which a text model cannot learn")
    account(part, handled, where, "part.", source)


def _key_of(part: dict[str, Any], kind: str, where: str, source: Source) -> str:
    keys = [key for key in dict.fromkeys((kind, *_KEYS)) if key in part]
    if len(keys) != 1:
        named = " and ".join(keys) if keys else "none of " + ", ".join(_KEYS)
        source.fail(f"{where} has a {kind} part with {named}: it needs one; found {sorted(part)}")
    return keys[0]


def _text_of(part: dict[str, Any], kind: str, where: str, handled: set[str], source: Source) -> str:
    key = _key_of(part, kind, where, source)
    handled.add(key)
    if not isinstance(part[key], str):
        source.fail(f"{where} must have a string under {key!r}, found {describe(part[key])}")
    text: str = part[key]
    return text


def _calls_of(
    part: dict[str, Any], kind: str, where: str, handled: set[str], source: Source
) -> tuple[ToolCall, ...]:
    if "name" in part:
        keys = ("name", "input", "arguments")
        handled.update(keys)
        call = {key: part[key] for key in keys if key in part}
        return parse_tool_calls(call, where, source)
    key = _key_of(part, kind, where, source) if "function" not in part else "function"
    handled.add(key)
    return parse_tool_calls(part[key], where, source)


def _result_of(part: dict[str, Any], where: str, handled: set[str], source: Source) -> str:
    keys = [key for key in ("content", "output", "text", "value") if key in part]
    handled.update(keys)
    if len(keys) > 1:
        source.fail(f"{where} has a result under {' and '.join(keys)}; keep one")
    return result_text(part[keys[0]] if keys else None, where, source)


def result_text(content: Any, where: str, source: Source) -> str:
    """Return what a tool gave back as text: parts are joined, other JSON values are written.

    Raises:
        DataError: for parts that are no text, and for values that are no JSON.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return check_text(content, where, source)
    if isinstance(content, list | tuple) and content and all(_is_part(item) for item in content):
        return join_parts(content, where, source)
    cleaned = source.reading.fillers.without(content, "result")
    return json.dumps(check_json(cleaned, where, source), ensure_ascii=False)


def _is_part(item: Any) -> bool:
    """Whether an item of a result is a part of a message, and no data with a type of its own."""
    return isinstance(item, dict) and item.get("type") in _PARTS

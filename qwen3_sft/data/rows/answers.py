"""What an assistant says, taken apart: reasoning, text, calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen3_sft.chat.samples import Message, ToolCall
from qwen3_sft.chat.templates import END_TOOL_CALL, THINK, TOOL_CALL
from qwen3_sft.data.rows.calls import Tools, parse_tool_calls
from qwen3_sft.data.rows.content import Content, read_content
from qwen3_sft.data.rows.reasoning import given_reasoning, split_think
from qwen3_sft.data.rows.source import Source
from qwen3_sft.data.rows.values import refuse_foreign_end, split_end, warn_control_text
from qwen3_sft.data.rows.written_calls import refuse_foreign_calls, split_calls


def parse_answer(
    content: Any,
    fields: Mapping[str, Any],
    where: str,
    source: Source,
    *,
    calls: tuple[ToolCall, ...] = (),
    tools: Tools = (),
) -> Message:
    """Parse an answer; one that is blank has neither text nor calls.

    Args:
        content: what it says: a string, parts, or what `read_content` made of them.
        fields: of the message, or of the row; its reasoning stands there.
        where: the place in the row.
        source: the row's location.
        calls: that it has apart from its text.
        tools: of the row, for calls that are written as text.

    Raises:
        DataError: for reasoning or calls that are not clear-cut.
    """
    if content is None:
        read = Content()
    else:
        read = (
            content
            if isinstance(content, Content)
            else read_content(content, f"{where} content", source)
        )
    calls = calls or read.calls
    # The renderer ends every answer: an end token in the text would be spelled out before it.
    text, _ = split_end(read.text)
    refuse_foreign_end(text, where, source)
    given = given_reasoning(fields, read.reasoning, where, source)
    written = None
    if given and not text.lstrip().startswith(THINK):
        reasoning = given
    else:
        written = text
        inline, text = split_think(text, where, source)
        if given and inline is not None and inline.strip() != given.strip():
            source.fail(
                f"{where} has reasoning_content and a {THINK} block in its content; keep one"
            )
        reasoning = inline or given or ""
        written = written if inline is not None and not given else None
    refuse_foreign_calls(text, where, source)
    if TOOL_CALL in text or END_TOOL_CALL in text:
        if calls:
            source.fail(f"{where} has {TOOL_CALL} in its text and tool_calls beside it; keep one")
        text, calls = split_calls(text, where, source, tools)
        written = None
    warn_control_text(text, source)
    return Message("assistant", text, reasoning if reasoning.strip() else None, calls, written)


def parse_call_turn(
    content: Any, fields: Mapping[str, Any], where: str, source: Source, *, tools: Tools = ()
) -> Message:
    """Parse a turn whose role says that it is a call, as ShareGPT and ms-swift write it.

    Raises:
        DataError: for what is no call.
    """
    reasoning = None
    if isinstance(content, list | tuple) and any(
        "type" in p for p in content if isinstance(p, dict)
    ):
        read = read_content(content, f"{where} content", source)
        if read.calls:
            return parse_answer(read, fields, where, source)
        content = read.text
    if isinstance(content, str):
        if TOOL_CALL in content:
            return parse_answer(content, fields, where, source, tools=tools)
        reasoning, content = split_think(content, where, source)
    given = given_reasoning(fields, reasoning, where, source)
    calls = parse_tool_calls(content, where, source)
    if not calls:
        source.fail(f"{where} is a call without a function; write its name and arguments as JSON")
    return Message("assistant", "", given if given and given.strip() else None, calls)

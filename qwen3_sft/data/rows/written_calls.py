"""The assistant's protocol written as text: `<tool_call>` and `<tool_response>` blocks are parsed.

Many data sets keep what a model said as one string. Trained as it is, the tags would become plain
tokens, which no server would take for a call, and a result in its tags would be wrapped twice.
"""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from qwen3_sft.chat.samples import ToolCall
from qwen3_sft.chat.templates import END_TOOL_CALL, END_TOOL_RESPONSE, TOOL_CALL, TOOL_RESPONSE
from qwen3_sft.data.rows.calls import Tools, parse_tool_calls
from qwen3_sft.data.rows.source import Source
from qwen3_sft.data.rows.values import load_json

_FUNCTION = re.compile(r"<function=([^>\n]+)>(.*)</function>", re.DOTALL)
_PARAMETER, _END_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?"), "</parameter>"


# How other models write a call, at the start of a line.
_FOREIGN_CALL = re.compile(
    r"^\s*(<functioncall>|<function_calls?>|<tool_calls>|<function=|\[TOOL_CALLS\]|<\|python_tag\|>"
    r"|<\|tool_calls?(?:_section)?_begin\|>|<\uff5ctool\u2581calls?\u2581begin\uff5c>)",
    re.MULTILINE,
)


def refuse_foreign_calls(text: str, where: str, source: Source) -> None:
    """Raise for a call that is written as another model writes it: no server would see a call.

    Raises:
        DataError: names what begins it.
    """
    found = _FOREIGN_CALL.search(text) if "<" in text or "[TOOL_CALLS]" in text else None
    if found and TOOL_CALL not in text:
        source.fail(
            f"{where} has {found[1]} (character {found.start(1)}), a call as another model writes "
            "it, which would be learned as text; write it as tool_calls"
        )


def split_calls(
    text: str, where: str, source: Source, tools: Tools = ()
) -> tuple[str, tuple[ToolCall, ...]]:
    """Split the calls off the end of what an assistant says: (text before them, calls).

    Args:
        text: an assistant's content without its reasoning.
        where: the place in the row, for errors.
        source: the row's location.
        tools: of the row; they say the types of arguments that are written as XML.

    Raises:
        DataError: for a block that is not closed or not readable, and for text after a call, which
            no template can show.
    """
    if TOOL_CALL not in text and END_TOOL_CALL not in text:
        return text, ()
    start = text.find(TOOL_CALL)
    said = text if start < 0 else text[:start]
    if END_TOOL_CALL in said:
        _fail(
            text, text.index(END_TOOL_CALL), f"{END_TOOL_CALL} without {TOOL_CALL}", where, source
        )
    calls: list[ToolCall] = []
    while start < len(text):
        if not text.startswith(TOOL_CALL, start):
            _fail(text, start, f"text after {END_TOOL_CALL}; calls end an answer", where, source)
        end = _end_of_call(text, start + len(TOOL_CALL), where, source)
        body = text[start + len(TOOL_CALL) : end]
        calls += _parse_block(body, f"{where} {TOOL_CALL} at character {start}", source, tools)
        start = _next(text, end + len(END_TOOL_CALL))
    return said.removesuffix("\n"), tuple(calls)


def split_responses(text: str, where: str, source: Source) -> list[str]:
    """Return the results that a tool's content holds: those of its blocks, or the content.

    Raises:
        DataError: for a block that is not closed, and for text outside of the blocks.
    """
    if not text.lstrip().startswith(TOOL_RESPONSE):
        return [text]
    results, start = [], _next(text, 0)
    while start < len(text):
        if not text.startswith(TOOL_RESPONSE, start):
            _fail(text, start, f"text after {END_TOOL_RESPONSE}", where, source)
        end = text.find(END_TOOL_RESPONSE, start)
        if end < 0:
            _fail(text, start, f"{TOOL_RESPONSE} without {END_TOOL_RESPONSE}", where, source)
        result = text[start + len(TOOL_RESPONSE) : end]
        results.append(result.removeprefix("\n").removesuffix("\n"))
        start = _next(text, end + len(END_TOOL_RESPONSE))
    return results


def _fail(text: str, at: int, problem: str, where: str, source: Source) -> NoReturn:
    source.fail(
        f"{where} has {problem} (character {at}: {text[at : at + 40]!r}); close each block, and "
        "put calls into tool_calls if the text is meant as text"
    )


def _next(text: str, start: int) -> int:
    """Return the first place from `start` on that is no blank, without a copy of what follows."""
    while start < len(text) and text[start].isspace():
        start += 1
    return start


def _end_of_call(text: str, start: int, where: str, source: Source) -> int:
    """Return where the closing tag begins; one inside a JSON string does not count."""
    try:
        _, after = json.JSONDecoder().raw_decode(text, _next(text, start))
    except ValueError:
        after = start
    end = text.find(END_TOOL_CALL, after)
    opened = text.find(TOOL_CALL, after)
    if end < 0 or -1 < opened < end:
        at = start - len(TOOL_CALL)
        _fail(text, at, f"{TOOL_CALL} without {END_TOOL_CALL}", where, source)
    return end


def _parse_block(body: str, where: str, source: Source, tools: Tools) -> tuple[ToolCall, ...]:
    if function := _FUNCTION.fullmatch(body.strip()):
        return (_parse_xml(function[1].strip(), function[2], where, source, tools),)
    calls = parse_tool_calls(load_json(body.strip(), where, source), where, source)
    if not calls:
        source.fail(f"{where} is empty")
    return calls


def _parse_xml(name: str, body: str, where: str, source: Source, tools: Tools) -> ToolCall:
    """Parse Qwen3-Coder's form, whose values are text unless the tool says otherwise."""
    types = _types(name, tools)
    arguments: dict[str, Any] = {}
    start = 0
    while (start := _next(body, start)) < len(body):
        begin = _PARAMETER.match(body, start)
        end = body.find(_END_PARAMETER, begin.end()) if begin else -1
        if not begin or end < 0:
            rest = body[start : start + 40].strip()
            source.fail(f"{where} has {rest!r} outside of its parameters")
        key, value = begin[1], body[begin.end() : end].removesuffix("\n")
        kind = types.get(key, "string")
        written = value.lower() if kind == "boolean" else value  # the template writes True
        is_text = kind == "string"
        arguments[key] = value if is_text else load_json(written, f"{where} {key}", source)
        start = end + len(_END_PARAMETER)
    return ToolCall(name, arguments)


def _types(name: str, tools: Tools) -> dict[str, Any]:
    for tool in tools:
        function = tool.get("function") or tool
        if function.get("name") == name:
            fields = (function.get("parameters") or {}).get("properties") or {}
            return {key: f.get("type") for key, f in fields.items() if isinstance(f, dict)}
    return {}

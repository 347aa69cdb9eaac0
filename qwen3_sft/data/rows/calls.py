"""Tool calls and tool descriptions, in every spelling that is clear."""

from __future__ import annotations

from typing import Any

from qwen3_sft.chat.samples import ToolCall
from qwen3_sft.data.rows.fields import account
from qwen3_sft.data.rows.source import Source
from qwen3_sft.data.rows.values import check_json, check_text, describe, load_json

Tools = tuple[dict[str, Any], ...]

_ARGUMENTS = ("arguments", "parameters", "input", "args")
_WRITE = 'write {"type": "function", "function": {"name": ..., "arguments": {...}}}'


def parse_tool_calls(value: Any, where: str, source: Source) -> tuple[ToolCall, ...]:
    """Parse calls in OpenAI's nested or the flat form; a string is JSON, one dict is one call.

    Raises:
        DataError: for anything else, and for arguments that are no object.
    """
    if isinstance(value, str) and value.strip():
        value = load_json(value, f"{where} tool_calls", source)
    calls = [value] if isinstance(value, dict) else value or []
    if not isinstance(calls, list | tuple):
        source.fail(f"{where} tool_calls must be a list, found {describe(value)}")
    return tuple(_parse_call(call, where, source) for call in calls)


def _parse_call(call: Any, where: str, source: Source) -> ToolCall:
    if isinstance(call, str):
        call = load_json(call, f"{where} tool call", source)
    outer = source.kept(call, "call.") if isinstance(call, dict) else {}
    function = outer.get("function") or outer
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        source.fail(f"{where} has a tool call without a function name: {describe(call)}; {_WRITE}")
    name = check_text(function["name"], f"{where} function name", source)
    place = f"{where} call of {name}"
    if function is not outer:
        function = source.kept(function, "call.")
        account(outer, ("function",), place, "call.", source)
    given = [key for key in _ARGUMENTS if key in function]
    if len(given) > 1:
        source.fail(f"{place} has {' and '.join(given)}; keep the arguments in one of them")
    account(function, ("name", *given), place, "call.", source)
    arguments = function[given[0]] if given else None
    return ToolCall(name, parse_arguments(arguments, f"{where} arguments of {name}", source))


def parse_arguments(value: Any, where: str, source: Source) -> dict[str, Any]:
    """Return the arguments of a call as an object: JSON in a string too, even twice encoded.

    Raises:
        DataError: they are something else.
    """
    from_text = isinstance(value, str)
    for _ in range(2):
        if isinstance(value, str):
            value = load_json(value, where, source) if value.strip() else {}
    value = {} if value is None else value
    if not isinstance(value, dict):
        source.fail(f"{where} must be an object, found {describe(value)}")
    value = source.reading.fillers.without(value, "arguments", from_text=from_text)
    checked: dict[str, Any] = check_json(value, where, source)
    return checked


def parse_tools(value: Any, where: str, source: Source) -> Tools:
    """Parse descriptions of functions: a list, also as a JSON string.

    Raises:
        DataError: for anything else, and for a function without a name.
    """
    from_text = isinstance(value, str)
    if isinstance(value, str) and value.strip():
        value = load_json(value, where, source)
    if not value:
        return ()
    if not isinstance(value, list | tuple):
        source.fail(f"{where} must be a list of functions, found {describe(value)}")
    place = where.removeprefix("column ").strip("'")
    return tuple(
        _parse_tool(tool, f"{place}[{index}]", source, from_text=from_text)
        for index, tool in enumerate(value)
        if tool is not None
    )


def _parse_tool(tool: Any, where: str, source: Source, *, from_text: bool) -> dict[str, Any]:
    if isinstance(tool, str):
        tool, from_text = load_json(tool, where, source), True
    function = (tool.get("function") or tool) if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        source.fail(f"{where} must describe a function with a name, found {describe(tool)}")
    cleaned = source.reading.fillers.schema(tool, from_text=from_text)
    checked: dict[str, Any] = check_json(cleaned, where, source)
    return checked


def as_openai_tools(functions: Tools) -> Tools:
    """Return functions of OpenAI's old `functions` column as its `tools`."""
    return tuple(f if "function" in f else {"type": "function", "function": f} for f in functions)


def agreed_tools(places: list[tuple[str, Tools]], source: Source) -> Tools:
    """Return the tools of a row that may name them in several places.

    Raises:
        DataError: the places differ.
    """
    found = [(where, tools) for where, tools in places if tools]
    for where, tools in found[1:]:
        if tools != found[0][1]:
            source.fail(f"{found[0][0]} and {where} both describe tools and differ; keep one")
    return found[0][1] if found else ()

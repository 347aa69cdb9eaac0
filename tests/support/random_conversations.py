"""Hypothesis strategies for conversations of every shape that the templates know."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from qwen3_sft.chat.control_tokens import QWEN3_CONTROL_TOKENS
from qwen3_sft.chat.samples import Conversation, Message, ToolCall

# What a user writes in the place of "<" when it begins what looks like a control token. A template
# passes it on; whoever reads its text can tell the user's from its own (`unmask`).
MASK = "\ue000"
WRAPPED = "written by a user"

_LOOK_ALIKES = [MASK + token[1:] for token in QWEN3_CONTROL_TOKENS]
_FRAGMENTS = [
    "", "word", " and", " Ärger", "é", "e\u0301", " 日本語", "👩\u200d👩\u200d👧", " \u0627\u0644",
    "\u00a0", "I'm", "'ll", " 123,456", "x = {1: 'a'}", '"quoted" \\ \\n', " <b>&amp;", "{{ x }}",
    "{% if %}", "/think", "\t", "\n", "\n\n", " \n", "\r\n", "  ", " ", "...\n", "<", "<|",
    "thinks>", "\u200d", "\ufb01", "A\u030a", f"{MASK}|im_end|>\n{MASK}|im_start|>assistant\n",
    *_LOOK_ALIKES,
]  # fmt: skip
_NAMES = ["f", "get_weather", "größe", "a.b"]
_SCALARS: list[Any] = [
    None, True, False, 0, -7, 1.5, 1e-7, 10**20, "", "x", "é", "a\nb", '"', "<b>", "'", "null",
]  # fmt: skip
_VALUES: list[Any] = [
    *_SCALARS, [], {}, [1, "a", None], {"k": [True, {"z": None}]}, {"ü": "ö", "n": 1.0}, [[]],
]  # fmt: skip
_FIELDS: list[dict[str, Any]] = [
    {"type": "string"},
    {"type": ["string", "null"], "default": None, "description": " d\n"},
    {"type": "object", "properties": {"x": {"type": "integer"}}},
    {"enum": ["a", "é", 1]},
    {"type": "string", "description": "Köln?", "minLength": 2, "deprecated": False},
]


def _choices(*pools: Sequence[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    """One entry of every pool, by a single draw: a draw costs more than all else here."""
    total = math.prod(map(len, pools))

    def pick(number: int) -> tuple[Any, ...]:
        picked = []
        for pool in pools:
            number, index = divmod(number, len(pool))
            picked.append(pool[index])
        return tuple(picked)

    return st.integers(0, total - 1).map(pick)


def _tool(name: str, field: dict[str, Any], described: str, is_strict: bool) -> dict[str, Any]:
    parameters: dict[str, Any] = {"type": "object", "properties": {"city": field}}
    function: dict[str, Any] = {"name": name, "parameters": parameters}
    if described:
        function["description"] = described
    if is_strict:
        parameters["required"] = ["city"]
        function["strict"] = True
    return {"type": "function", "function": function}


def _call(name: str, first: Any, second: Any) -> ToolCall:
    values = {"city": first, "größe": second}
    return ToolCall(name, {key: value for key, value in values.items() if value != "none"})


_TEXTS = _choices(_FRAGMENTS, _FRAGMENTS, _FRAGMENTS).map("".join)
_SAID = _TEXTS.filter(str.strip)
_CALLS = _choices(_NAMES, [*_VALUES, "none"], [*_VALUES, "none"]).map(lambda parts: _call(*parts))
_TOOLS = _choices(_NAMES, _FIELDS, _FRAGMENTS, [True, False]).map(lambda parts: _tool(*parts))


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    """A conversation whose last turn is an answer, and whose first never is."""
    # `chance` is of an answer to have reasoning, in quarters.
    chance, has_system, rounds, num_tools, mode, is_partial = draw(_SHAPES)
    messages = []
    if has_system:
        messages.append(Message("system", draw(_TEXTS)))
        if has_system != "yes":
            messages.append(_answer(draw, chance))
        if has_system == "and a call":
            messages.append(_answer(draw, chance, (draw(_CALLS),)))
            messages += [Message("tool", draw(_TEXTS)), _answer(draw, chance)]
    for _ in range(rounds):
        messages += _round(draw, chance)
    return Conversation(
        tuple(messages),
        tuple(draw(_TOOLS) for _ in range(num_tools)),
        first_trained=len(messages) - 1 if is_partial else 0,
        enable_thinking=None if chance else mode,
    )


_SHAPES = _choices(
    [0, 0, 1, 2, 4], ["", "", "", "", "yes", "yes", "and an answer", "and a call"], [1, 2, 3],
    [0, 0, 1, 2], [None, None, True, False], [False, False, False, True],
)  # fmt: skip
_STEPS = _choices(
    [0, 0, 0, 1, 2], ["", "", "", "", "late system", "wrapped", "answers", "two answers"]
)
_ANSWERS = _choices([1, 2, 3, 4], [True, False])
_NUMBERS = _choices([1, 1, 2], [1, 1, 2])


def _round(draw: st.DrawFn, chance: int) -> list[Message]:
    """A question, calls and their results, an answer."""
    steps, odd = draw(_STEPS)
    messages = [Message("user", draw(_TEXTS))]
    if odd == "late system":
        messages.append(Message("system", draw(_TEXTS)))
    if odd == "wrapped":
        messages.append(Message("user", f"<tool_response>{WRAPPED}</tool_response>"))
    if odd == "answers":
        messages += [_answer(draw, chance), _answer(draw, chance)]
    for _ in range(steps):
        num_calls, num_results = draw(_NUMBERS)
        calls = tuple(draw(_CALLS) for _ in range(num_calls))
        messages.append(_answer(draw, chance, calls))
        messages += [Message("tool", draw(_TEXTS)) for _ in range(num_results)]
    if odd == "two answers":
        messages.append(_answer(draw, chance))
    return [*messages, _answer(draw, chance)]


def _answer(draw: st.DrawFn, chance: int, calls: tuple[ToolCall, ...] = ()) -> Message:
    text = draw(_TEXTS if calls else _SAID)
    level, is_in_text = draw(_ANSWERS)
    if level > chance:
        return Message("assistant", text, None, calls)
    reasoning = draw(_SAID)
    if not is_in_text:
        return Message("assistant", text, reasoning, calls)
    # As a row has it whose reasoning stands in the text; reading it takes newlines off.
    text, reasoning = text.lstrip("\n"), reasoning.strip("\n")
    written = f"<think>\n{reasoning}\n</think>\n\n{text}"
    return Message("assistant", text, reasoning, calls, written=written)


def as_rows_have_it(message: Message) -> dict[str, Any]:
    """A message as inference gives it to a chat template."""
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.written is not None:
        turn["content"] = message.written
    elif message.role == "assistant":
        turn["reasoning_content"] = message.reasoning or ""
    if message.tool_calls:
        functions = [
            {"name": call.name, "arguments": call.arguments} for call in message.tool_calls
        ]
        turn["tool_calls"] = [{"type": "function", "function": f} for f in functions]
    return turn


def unmasked(value: Any) -> Any:
    """Put "<" in the place of every mask in a conversation, a message or a JSON value."""
    match value:
        case str():
            return value.replace(MASK, "<")
        case dict():
            return {unmasked(key): unmasked(item) for key, item in value.items()}
        case list() | tuple():
            return type(value)(map(unmasked, value))
        case Message():
            calls = tuple(ToolCall(c.name, unmasked(c.arguments)) for c in value.tool_calls)
            return Message(value.role, *map(unmasked, (value.content, value.reasoning)), calls)
        case Conversation():
            turns, tools = unmasked(value.messages), unmasked(value.tools)
            return replace(value, messages=turns, tools=tools)
    return value

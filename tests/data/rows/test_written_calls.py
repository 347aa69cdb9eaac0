"""Calls and results that data sets write as text: control tokens, wrapped once, or refused."""

from __future__ import annotations

import pytest

from qwen3_sft.chat.samples import ToolCall
from qwen3_sft.errors import DataError
from tests.support.data_rows import ANSWER, USER, answer, chat, parse

TIDE = ToolCall("tide", {"port": "Rye"})
BLOCK = '<tool_call>\n{"name": "tide", "arguments": {"port": "Rye"}}\n</tool_call>'
TOOLS = [
    {
        "name": "tide",
        "parameters": {
            "type": "object",
            "properties": {
                "port": {"type": "string"},
                "day": {"type": "integer"},
                "now": {"type": "boolean"},
                "at": {"type": "array"},
            },
        },
    }
]


def said(content, **columns):
    message = parse(chat(USER, {"role": "assistant", "content": content}, **columns))[0].messages[1]
    return message.reasoning, message.content, message.tool_calls


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (BLOCK, (None, "", (TIDE,))),
        (f"I look.\n{BLOCK}", (None, "I look.", (TIDE,))),
        (f"I look.{BLOCK}\n", (None, "I look.", (TIDE,))),
        (f"{BLOCK}\n{BLOCK}", (None, "", (TIDE, TIDE))),
        (f"<think>\nwhy\n</think>\n\n{BLOCK}", ("why", "", (TIDE,))),
        (f"why\n</think>\n\nI look.\n{BLOCK}<|im_end|>\n", ("why", "I look.", (TIDE,))),
        (
            '<tool_call>{"arguments": {"port": "Rye"}, "name": "tide"}</tool_call>',
            (None, "", (TIDE,)),
        ),
        (
            "<tool_call>\n{'name': 'tide', 'arguments': {'port': 'Rye'}}\n</tool_call>",
            (None, "", (TIDE,)),
        ),
        (
            '<tool_call>{"name": "tide", "arguments": "{\\"port\\": \\"Rye\\"}"}</tool_call>',
            (None, "", (TIDE,)),
        ),
        (
            '<tool_call>[{"name": "tide", "arguments": {"port": "Rye"}}]</tool_call>',
            (None, "", (TIDE,)),
        ),
        (
            '<tool_call>{"name": "f", "arguments": {"x": "</tool_call>"}}</tool_call>',
            (None, "", (ToolCall("f", {"x": "</tool_call>"}),)),
        ),
        (
            "<tool_call>\n<function=tide>\n<parameter=port>\nRye\n</parameter>\n<parameter=day>\n4\n"
            "</parameter>\n<parameter=now>\nTrue\n</parameter>\n<parameter=at>\n[1]\n</parameter>\n"
            "</function>\n</tool_call>",
            (None, "", (ToolCall("tide", {"port": "Rye", "day": 4, "now": True, "at": [1]}),)),
        ),
    ],
)
def test_calls_in_an_answer(content, expected):
    assert said(content, tools=TOOLS) == expected


def test_without_a_tool_the_arguments_of_xml_are_text():
    content = "<tool_call><function=f><parameter=a>4</parameter></function></tool_call>"
    assert said(content) == (None, "", (ToolCall("f", {"a": "4"}),))


def test_results_are_unwrapped_and_split():
    wrapped = '<tool_response>\n{"h": 4}\n</tool_response>\n<tool_response>\n5\n</tool_response>'
    turns = [("human", "q"), ("gpt", BLOCK), ("tool", wrapped), ("gpt", "4 m")]
    sample, warnings = parse({"conversations": [{"from": f, "value": v} for f, v in turns]})
    results = [m.content for m in sample.messages if m.role == "tool"]
    assert results == ['{"h": 4}', "5"]
    assert not warnings


@pytest.mark.parametrize("role", ["user", "system", "tool"])
def test_what_others_than_the_assistant_write_stays_text(role):
    text = f"say {BLOCK}"
    order = (
        [{"role": role, "content": text}, USER]
        if role == "system"
        else [USER, ANSWER, {"role": role, "content": text}]
    )
    sample, _ = parse(chat(*order, ANSWER))
    assert text in [message.content for message in sample.messages]


ERRORS = [
    ('<tool_call>\n{"name": "f"}', "<tool_call> without </tool_call>.*character 0"),
    ("use the <tool_call> tag", "<tool_call> without </tool_call>.*character 8"),
    ("x</tool_call>", "</tool_call> without <tool_call>.*character 1"),
    (f"{BLOCK}\nThat was it.", "text after </tool_call>; calls end an answer.*'That was it.'"),
    (f"{BLOCK}</tool_call>", "text after </tool_call>"),
    ("<tool_call>{broken}</tool_call>", "<tool_call> at character 0 is not valid JSON"),
    ("<tool_call></tool_call>", "<tool_call> at character 0 is not valid JSON"),
    ("<tool_call>[]</tool_call>", "<tool_call> at character 0 is empty"),
    ('<tool_call>{"arguments": {}}</tool_call>', "without a function name"),
    ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', "must be an object, found list"),
    ('<tool_call>{"name": "f", "colour": 1}</tool_call>', "unknown meaning: call.colour"),
    ("<tool_call><function=f>x</function></tool_call>", "'x' outside of its parameters"),
    (f"<tool_call>\n{BLOCK}", "<tool_call> without </tool_call>|not valid JSON"),
]


@pytest.mark.parametrize(("content", "message"), ERRORS)
def test_a_malformed_call_is_refused_with_its_place(content, message):
    with pytest.raises(DataError, match=rf"^f:1: messages\[1\] .*({message})"):
        said(content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("<tool_response>4", "<tool_response> without </tool_response>"),
        ("<tool_response>4</tool_response> or 5", "text after </tool_response>.*'or 5'"),
    ],
)
def test_a_malformed_result_is_refused_with_its_place(content, message):
    with pytest.raises(DataError, match=rf"^f:1: messages\[2\] content has {message}"):
        parse(chat(USER, ANSWER, {"role": "tool", "content": content}, ANSWER))


def test_a_call_has_one_place():
    call = {"name": "tide", "arguments": {"port": "Rye"}}
    with pytest.raises(DataError, match=r"<tool_call> in its text and tool_calls beside it"):
        parse(answer(content=BLOCK, tool_calls=[call]))

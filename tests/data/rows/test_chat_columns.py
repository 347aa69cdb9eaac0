"""Columns beside a conversation that change it: system prompt, tools, whether it thinks."""

from __future__ import annotations

import pytest

from qwen3_sft.chat.samples import PlainText
from qwen3_sft.errors import DataError
from tests.support.data_rows import ANSWER, BY_FORMAT, USER, answer, chat, parse

TOOL = {"type": "function", "function": {"name": "tide", "parameters": {}}}
CHATS = [name for name in BY_FORMAT if name not in ("prompt_completion", "text", "tokens")]


@pytest.mark.parametrize("fmt", CHATS)
@pytest.mark.parametrize("name", ["system", "system_prompt", "system_message"])
def test_the_system_column_is_a_message(fmt, name):
    sample, _ = parse(BY_FORMAT[fmt] | {name: "be brief"})
    plain, _ = parse(BY_FORMAT[fmt])
    assert (sample.messages[0].role, sample.messages[0].content) == ("system", "be brief")
    assert sample.messages[1:] == plain.messages
    assert sample.first_trained == plain.first_trained + bool(plain.first_trained)


@pytest.mark.parametrize("fmt", CHATS)
@pytest.mark.parametrize(
    "columns",
    [
        {"tools": [TOOL]},
        {"tools": '[{"type": "function", "function": {"name": "tide", "parameters": {}}}]'},
        {"functions": [TOOL["function"]]},
        {"tools": [TOOL], "functions": [TOOL["function"]]},
    ],
)
def test_tools_are_honoured_in_every_chat(fmt, columns):
    assert parse(BY_FORMAT[fmt] | columns)[0].tools == (TOOL,)


def test_tools_of_messages_are_honoured():
    system = {"role": "system", "content": "s"}
    for place in ({**system, "tools": [TOOL]}, {**system, "tools": str([TOOL])}):
        assert parse(chat(place, USER, ANSWER))[0].tools == (TOOL,)
    part = [{"type": "text", "text": "s"}, {"type": "tools", "value": str([TOOL])}]
    sample, _ = parse(chat({"role": "system", "content": part}, USER, ANSWER))
    assert (sample.tools, sample.messages[0].content) == ((TOOL,), "s")
    other = {"type": "function", "function": {"name": "moon"}}
    with pytest.raises(DataError, match="both describe tools and differ"):
        parse(chat({**system, "tools": [TOOL]}, USER, ANSWER, tools=[other]))


@pytest.mark.parametrize("fmt", ["prompt_completion", "text"])
@pytest.mark.parametrize(
    "column",
    [
        {"system": "s"},
        {"tools": [TOOL]},
        {"functions": [TOOL]},
        {"history": [["a", "b"]]},
        {"enable_thinking": False},
        {"chat_template_kwargs": {"enable_thinking": True}},
    ],
)
def test_plain_text_has_no_place_for_what_belongs_to_chats(fmt, column):
    with pytest.raises(DataError, match=f"column '{next(iter(column))}' has no place beside plain"):
        parse(BY_FORMAT[fmt] | column)
    assert isinstance(parse(BY_FORMAT[fmt])[0], PlainText)


@pytest.mark.parametrize("fmt", CHATS)
@pytest.mark.parametrize(
    ("columns", "mode"),
    [
        ({"enable_thinking": False}, False),
        ({"enable_thinking": True}, True),
        ({"enable_thinking": "false"}, False),
        ({"enable_thinking": 1}, True),
        ({}, None),
        ({"chat_template_kwargs": {"enable_thinking": True}}, True),
        ({"chat_template_kwargs": '{"enable_thinking": false}'}, False),
        ({"chat_template_kwargs": {"enable_thinking": None, "xml_tools": []}}, None),
    ],
)
def test_the_mode_of_a_row_is_kept(fmt, columns, mode):
    assert parse(BY_FORMAT[fmt] | columns)[0].enable_thinking is mode


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            answer(content="<think>r</think>a") | {"enable_thinking": False},
            "false but an answer has",
        ),
        (
            answer(content="a", reasoning="r") | {"enable_thinking": False},
            "false but an answer has",
        ),
        (chat(USER, ANSWER, enable_thinking="perhaps"), "set it to true or false"),
        (
            chat(
                USER, ANSWER, enable_thinking=True, chat_template_kwargs={"enable_thinking": False}
            ),
            "contradict each other",
        ),
        (chat(USER, ANSWER, chat_template_kwargs=[1]), "must be an object, found list"),
        (chat(USER, ANSWER, system="s", system_prompt="t"), "differ; keep one system prompt"),
        (
            chat({"role": "system", "content": "s"}, USER, ANSWER, system="t"),
            "both system messages",
        ),
    ],
)
def test_contradictions_are_refused(row, words):
    with pytest.raises(DataError, match=f"^f:1: .*{words}"):
        parse(row)

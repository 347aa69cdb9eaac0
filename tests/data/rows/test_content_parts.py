"""Content that comes in parts: which are read, and which are refused by their type."""

from __future__ import annotations

import json

import pytest

from qwen3_sft.chat.samples import Message, ToolCall
from qwen3_sft.errors import DataError
from tests.support.data_rows import ANSWER, USER, answer, chat, parse

TIDE = {"name": "tide", "arguments": {"port": "Rye"}}
CALL = ToolCall("tide", {"port": "Rye"})


def messages(row):
    return list(parse(row)[0].messages)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "thinking", "thinking": "why", "signature": "s"},
        {"type": "reasoning", "text": "why"},
        {"type": "thinking", "value": "why"},
        {"type": "reasoning", "content": "why"},
    ],
)
def test_reasoning_in_parts(part):
    row = answer(content=[part, {"type": "text", "text": "a"}])
    assert messages(row)[1] == Message("assistant", "a", "why")


def test_reasoning_details_are_read():
    details = [{"type": "reasoning.text", "text": "wh"}, {"type": "reasoning.text", "text": "y"}]
    assert messages(answer(content="a", reasoning_details=details))[1].reasoning == "why"
    with pytest.raises(DataError, match="reasoning_details must be a list of texts"):
        parse(answer(content="a", reasoning_details=[{"type": "reasoning.encrypted", "data": "x"}]))


@pytest.mark.parametrize("key", ["text", "value", "content"])
def test_text_parts_under_every_key(key):
    row = chat({"role": "user", "content": [{"type": "text", key: "q"}]}, ANSWER)
    assert messages(row)[0] == Message("user", "q")
    parts = [{"type": "output_text", key: "a"}]
    assert messages(chat(USER, {"role": "assistant", "content": parts}))[1] == Message(
        "assistant", "a"
    )


def test_parts_of_anthropic_are_calls_and_results():
    row = chat(
        {"role": "user", "content": "tide?"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "look", "signature": "x"},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "t1", "name": "tide", "input": {"port": "Rye"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "t1",
                    "content": [{"type": "text", "text": "4"}],
                },
                {"type": "text", "text": "So?"},
            ],
        },
        {"role": "assistant", "content": "4 m"},
    )
    assert messages(row) == [
        Message("user", "tide?"),
        Message("assistant", "I look.", "look", (CALL,)),
        Message("tool", "4"),
        Message("user", "So?"),
        Message("assistant", "4 m"),
    ]


def test_parts_of_llama_factory():
    call = [{"type": "reasoning", "value": "why"}, {"type": "tool_call", "value": json.dumps(TIDE)}]
    row = chat(
        {"role": "user", "content": [{"type": "text", "value": "q"}], "loss_weight": 0.0},
        {"role": "assistant", "content": call, "loss_weight": 1.0},
    )
    assert messages(row)[1] == Message("assistant", "", "why", (CALL,))


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (
            {"type": "image_url", "image_url": {"url": "x"}},
            "of type 'image_url', which a text model",
        ),
        ({"type": "input_audio"}, "of type 'input_audio'"),
        ({"type": "video"}, "of type 'video'"),
        ({"type": "redacted_thinking", "data": "x"}, "reasoning that its provider has encrypted"),
        ({"type": "refusal", "refusal": "no"}, "a refusal apart from the text"),
        ({"type": "text"}, "text part with none of"),
        ({"text": 3}, "must have a string under 'text'"),
        ({"type": "text", "text": "a", "value": "b"}, "text part with text and value"),
        ({"type": "tool_result", "content": "x"}, "a part for results"),
        (3, "must be a part"),
    ],
)
def test_parts_that_cannot_be_learned_are_named(part, words):
    with pytest.raises(DataError, match=rf"^f:1: messages\[1\].*{words}"):
        parse(answer(content=[part]))

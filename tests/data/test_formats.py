from __future__ import annotations

import json

import numpy as np
import pytest

from qwen3_sft.chat.samples import Conversation, Dropped, Message, PlainText, Tokens, ToolCall
from qwen3_sft.data.formats import detect_format, require_format
from qwen3_sft.errors import DataError
from tests.support.data_rows import ANSWER, USER, answer, chat, parse

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {}}}


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"messages", "tools", "id"}, "messages"),
        ({"messages", "prompt", "prompt_id"}, "messages"),
        ({"conversations", "system"}, "sharegpt"),
        ({"instruction", "input", "output"}, "alpaca"),
        ({"prompt", "completion"}, "prompt_completion"),
        ({"text", "meta"}, "text"),
        ({"input_ids", "attention_mask"}, "tokens"),
    ],
)
def test_formats_are_read_off_the_columns(columns, expected):
    assert detect_format(columns, "f:1") == expected


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"messages", "input_ids"}, ["messages", "input_ids", "--dataset_format"]),
        ({"text", "instruction", "output"}, ["instruction+output", "text"]),
        ({"prompt", "answer"}, ["'answer'", "'prompt'", "RL prompt", "--columns question=prompt"]),
        ({"utterance", "reply"}, ["'reply'", "accepted", "conversations", "--columns"]),
        (set(), ["accepted"]),
    ],
)
def test_unclear_columns_are_errors_that_name_them(columns, words):
    with pytest.raises(DataError) as caught:
        detect_format(columns, "data.jsonl:3")
    message = str(caught.value)
    assert message.startswith("data.jsonl:3: ")
    assert all(word in message for word in words)


def test_a_file_keeps_one_format():
    require_format("text", "text", "f:2")
    with pytest.raises(DataError, match="f:2: this row is 'text' but the file began as 'tokens'"):
        require_format("tokens", "text", "f:2")


def test_messages_row():
    sample, warnings = parse(chat({"role": "system", "content": "s"}, USER, ANSWER))
    assert sample == Conversation(
        (Message("system", "s"), Message("user", "q"), Message("assistant", "a"))
    )
    assert not warnings


@pytest.mark.parametrize(
    ("name", "role"),
    [("human", "user"), ("user", "user"), ("system", "system"), ("gpt", "assistant")],
)
def test_sharegpt_names(name, role):
    turns = [{"from": name, "value": "x"}, {"from": "gpt", "value": "y"}]
    sample, _ = parse({"conversations": turns})
    assert [m.role for m in sample.messages] == [role, "assistant"]


def test_sharegpt_with_system_tools_and_calls():
    call = {"name": "weather", "arguments": {"city": "Köln"}}
    turns = [
        ("human", "q"),
        ("function_call", json.dumps(call)),
        ("observation", "9"),
        ("gpt", "a"),
    ]
    row = {
        "conversations": [{"from": name, "value": value} for name, value in turns],
        "system": "s",
        "tools": json.dumps([WEATHER]),
    }
    sample, warnings = parse(row)
    assert [m.role for m in sample.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert sample.messages[2].tool_calls == (ToolCall("weather", {"city": "Köln"}),)
    assert sample.tools == (WEATHER,)
    assert not warnings


def test_alpaca_row_joins_input_and_keeps_history():
    row = {
        "instruction": "add",
        "input": "1 2",
        "output": "3",
        "system": "s",
        "history": [["hi", "hello"]],
    }
    sample, _ = parse(row)
    said = [(m.role, m.content) for m in sample.messages]
    assert said == [
        ("system", "s"),
        ("user", "hi"),
        ("assistant", "hello"),
        ("user", "add\n1 2"),
        ("assistant", "3"),
    ]
    sample, _ = parse({"instruction": "add", "input": None, "output": "3"})
    assert [m.content for m in sample.messages] == ["add", "3"]


def test_prompt_completion_as_text_and_as_messages():
    assert parse({"prompt": "p", "completion": "c"})[0] == PlainText("p", "c")
    row = {"prompt": [USER, ANSWER, USER], "completion": [ANSWER], "tools": [WEATHER]}
    sample, _ = parse(row)
    assert (len(sample.messages), sample.first_trained, sample.tools) == (4, 3, (WEATHER,))


def test_text_row_and_token_rows():
    assert parse({"text": "t"})[0] == PlainText("", "t")
    sample, _ = parse({"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, vocab_size=8)
    assert isinstance(sample, Tokens)
    assert sample.input_ids.dtype == sample.labels.dtype == np.int32
    assert sample.trained.tolist() == [False, True, True]
    assert parse({"input_ids": np.array([5, 6])})[0].trained.all()


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": " \n"}, "a blank text"),
        ({"prompt": "p", "completion": ""}, "a blank answer"),
        ({"instruction": "i", "output": ""}, "a blank answer"),
        ({"input_ids": []}, "no tokens"),
        ({"input_ids": [3]}, "one token, nothing to predict"),
    ],
)
def test_rows_with_nothing_in_them_are_dropped_by_name(row, reason):
    assert parse(row)[0] == Dropped(reason)


@pytest.mark.parametrize("arguments", [{"b": 1, "a": "é"}, '{"b": 1, "a": "é"}'])
@pytest.mark.parametrize("flat", [False, True])
def test_tool_calls_in_every_spelling(arguments, flat):
    call = {"name": "weather", "arguments": arguments}
    call = call if flat else {"id": "1", "type": "function", "function": call}
    for content in (None, "", "let me see"):
        sample, _ = parse(answer(content=content, tool_calls=[call]))
        message = sample.messages[1]
        assert message.content == (content or "")
        assert list(message.tool_calls[0].arguments.items()) == [("b", 1), ("a", "é")]


def test_null_keys_of_arrow_rows_are_absent():
    fields = dict.fromkeys(["tool_calls", "reasoning_content", "from", "value", "weight"])
    row = chat({**USER, **fields}, {**ANSWER, **fields}, tools=None, system=None)
    assert parse(row) == parse(chat(USER, ANSWER))


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert parse(answer(content=parts))[0].messages[1].content == "ab"


@pytest.mark.parametrize(
    ("content", "reasoning", "said"),
    [
        ("<think>\nwhy\n</think>\n\nx", "why", "x"),
        ("\n<think>why</think>x", "why", "x"),
        ("<think>\n\n</think>\n\nx", None, "x"),
        ("x <think> y", None, "x <think> y"),
        ("x\n</think>\n\ny", "x", "y"),
        ("</think>\n\ny", None, "y"),
    ],
)
def test_a_leading_think_block_is_reasoning(content, reasoning, said):
    message = parse(answer(content=content))[0].messages[1]
    assert (message.reasoning, message.content) == (reasoning, said)


def test_reasoning_content_is_reasoning():
    message = parse(answer(content="x", reasoning_content="why"))[0].messages[1]
    assert (message.reasoning, message.content) == ("why", "x")
    assert parse(answer(content="x", reasoning_content=" "))[0].messages[1].reasoning is None


def test_the_wanted_format_decides_between_several():
    columns = {"instruction", "input", "output", "text"}
    with pytest.raises(DataError, match=r"a:1: .*--dataset_format alpaca or text"):
        detect_format(columns, "a:1")
    assert detect_format(columns, "a:1", "alpaca") == "alpaca"
    with pytest.raises(DataError, match=r"a:1: --dataset_format messages needs .* messages"):
        detect_format(columns, "a:1", "messages")

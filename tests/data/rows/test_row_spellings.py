"""Spellings that are common and clear: what each is read as."""

from __future__ import annotations

import json

import pytest

from qwen3_sft.chat.samples import Message, PlainText, ToolCall
from qwen3_sft.errors import DataError
from tests.support.data_rows import ANSWER, USER, answer, chat, parse

TIDE = {"name": "tide", "arguments": {"port": "Rye"}}
CALL = ToolCall("tide", {"port": "Rye"})


def messages(row):
    return list(parse(row)[0].messages)


@pytest.mark.parametrize(
    ("name", "role"),
    [
        *((n, "user") for n in ("user", "human", "Human", "USER", "prompter", " user ")),
        *(
            (n, "assistant")
            for n in ("assistant", "gpt", "chatgpt", "bing", "bard", "Assistant", "model")
        ),
        *((n, "system") for n in ("system", "System", "developer")),
        *((n, "tool") for n in ("tool", "function", "observation", "ipython", "tool_response")),
    ],
)
def test_roles(name, role):
    for keys in (
        ("role", "content"),
        ("from", "value"),
        ("role", "value"),
        ("from", "content"),
        ("role", "text"),
    ):
        turn = dict(zip(keys, (name, "x"), strict=True))
        turns = [turn, USER, ANSWER] if role == "system" else [USER, ANSWER, turn, ANSWER]
        assert Message(role, "x") in messages(chat(*turns))


@pytest.mark.parametrize("role", ["function_call", "tool_call"])
@pytest.mark.parametrize(
    "content",
    [
        TIDE,
        [TIDE],
        json.dumps(TIDE),
        json.dumps([TIDE]),
        f"<tool_call>\n{json.dumps(TIDE)}\n</tool_call>",
        str(TIDE),
        {"name": "tide", "arguments": json.dumps(TIDE["arguments"])},
        {"name": "tide", "arguments": json.dumps(json.dumps(TIDE["arguments"]))},
        {"type": "function", "function": TIDE},
        {"name": "tide", "parameters": {"port": "Rye"}},
    ],
)
def test_turns_that_are_calls(role, content):
    turns = messages(chat(USER, {"role": role, "content": content}))
    assert turns == [Message("user", "q"), Message("assistant", "", None, (CALL,))]
    turns = messages(chat(USER, ANSWER, {"role": role, "content": content}))
    assert turns[1:] == [Message("assistant", "a", None, (CALL,))]  # one answer, as generated
    twice = [{"role": role, "content": content}] * 2
    assert messages(chat(USER, *twice))[1:] == [Message("assistant", "", None, (CALL, CALL))]


@pytest.mark.parametrize(
    "content",
    [
        f"<think>need tool</think>{json.dumps(TIDE)}",
        f"need tool\n</think>\n\n{json.dumps(TIDE)}",
        f"<think>\nneed tool\n</think>\n<tool_call>{json.dumps(TIDE)}</tool_call>",
    ],
)
def test_a_call_after_reasoning(content):
    turns = [{"from": "human", "value": "q"}, {"from": "function_call", "value": content}]
    assert messages({"conversations": turns})[1] == Message("assistant", "", "need tool", (CALL,))


@pytest.mark.parametrize("arguments", ["", None, {}, "{}", '"{}"', " "])
def test_a_call_without_arguments(arguments):
    row = answer(tool_calls=[{"function": {"name": "now", "arguments": arguments}}])
    assert messages(row)[1].tool_calls == (ToolCall("now", {}),)


def test_openais_old_call():
    call = {"name": "tide", "arguments": '{"port": "Rye"}'}
    row = chat(
        USER,
        {"role": "assistant", "content": None, "function_call": call},
        {"role": "function", "name": "tide", "content": "4"},
        ANSWER,
    )
    assert messages(row)[1:3] == [Message("assistant", "", None, (CALL,)), Message("tool", "4")]
    both = {"tool_calls": [{"function": call}], "function_call": {"name": "other"}}
    with pytest.raises(DataError, match="tool_calls and function_call, which differ"):
        parse(answer(**both))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"height": 4, "at": None}, '{"height": 4, "at": null}'),
        ([1, 2], "[1, 2]"),
        (4, "4"),
        (None, ""),
        (True, "true"),
        ("4", "4"),
        ([{"type": "text", "text": "4"}], "4"),
        ({"höhe": "4"}, '{"höhe": "4"}'),
        ([{"height": 4}], '[{"height": 4}]'),
    ],
)
def test_results_of_tools(content, text):
    row = chat(USER, ANSWER, {"role": "tool", "content": content}, ANSWER)
    assert messages(row)[2] == Message("tool", text)


@pytest.mark.parametrize(
    "key", ["reasoning_content", "reasoning", "thinking", "thought", "reasoning_text"]
)
def test_reasoning_under_every_key(key):
    expected = Message("assistant", "a", "why")
    assert messages(answer(content="a", **{key: "why"}))[1] == expected
    assert messages(answer(content="a", **{key: "why", "reasoning_content": "why"}))[1] == expected
    assert (
        messages(
            {
                "conversations": [
                    {"from": "human", "value": "q"},
                    {"from": "gpt", "value": "a", key: "why"},
                ]
            }
        )[1]
        == expected
    )
    assert messages({"question": "q", "answer": "a", key: "why"})[1] == expected
    assert messages({"instruction": "q", "output": "a", key: "why"})[1] == expected
    assert messages(answer(content="<think>why</think>a", **{key: "why"}))[1] == expected
    for row in (
        answer(
            content="a",
            **{
                key: "why",
                "reasoning_content" if key != "reasoning_content" else "thinking": "other",
            },
        ),
        answer(content="<think>other</think>a", **{key: "why"}),
    ):
        with pytest.raises(DataError, match=r"messages\[1\] has reasoning.*keep one"):
            parse(row)
    with pytest.raises(DataError, match=f"messages\\[0\\] is a user message with {key}"):
        parse(chat({**USER, key: "why"}, ANSWER))


@pytest.mark.parametrize(
    ("ask", "say"),
    [
        ("query", "response"),
        ("question", "answer"),
        ("question", "response"),
        ("prompt", "response"),
        ("input", "output"),
        ("user", "assistant"),
        ("instruction", "response"),
    ],
)
def test_pairs_of_columns_are_a_chat(ask, say):
    expected = [Message("user", "q"), Message("assistant", "a", "why")]
    assert messages({ask: "q", say: "<think>why</think>a"}) == expected
    with_history = {ask: "q", say: "a", "history": [["q0", "a0"]], "system": "s"}
    assert [m.content for m in messages(with_history)] == ["s", "q0", "a0", "q", "a"]
    as_text = with_history | {"history": '[["q0", "a0"]]'}
    assert messages(as_text) == messages(with_history)


def test_two_pairs_of_columns_are_unclear():
    row = {"question": "q", "answer": "4", "response": "It is 4."}
    with pytest.raises(DataError, match=r"question\+answer and question\+response could each be"):
        parse(row)


def test_a_switch_beside_a_pair_is_no_reasoning():
    sample, _ = parse({"input": [USER], "output": "a", "reasoning": "off"})
    assert (sample.messages[-1].reasoning, sample.enable_thinking) == (None, False)
    sample, _ = parse({"input": "q", "output": "<think>why</think>a", "reasoning": "on"})
    assert (sample.messages[-1].reasoning, sample.enable_thinking) == ("why", True)


@pytest.mark.parametrize(
    "turns",
    [
        [{"human": "q", "assistant": "a"}],
        [{"user": "q", "gpt": "a"}],
        [{"input": "q", "output": "a"}],
        json.dumps([USER, ANSWER]),
        str([USER, ANSWER]),
        [{"role": "user", "value": "q"}, {"from": "gpt", "content": "a"}],
    ],
)
@pytest.mark.parametrize("column", ["messages", "conversations", "conversation"])
def test_lists_of_turns(turns, column):
    assert messages({column: turns}) == [Message("user", "q"), Message("assistant", "a")]


@pytest.mark.parametrize(
    "end", ["<|im_end|>", "<|endoftext|>", "<|im_end|>\n", "<|im_end|><|endoftext|>"]
)
def test_end_tokens_are_kept_once(end):
    assert messages(answer(content=f"a{end}"))[1] == Message("assistant", "a")
    assert parse({"text": f"The tide.{end}"})[0] == PlainText(
        "", "The tide.", end[: end.index(">") + 1]
    )
    completion = parse({"prompt": "p", "completion": f"c{end}"})[0]
    assert (completion.completion, completion.end) == ("c", end[: end.index(">") + 1])


def test_end_tokens_inside_are_refused_by_what_they_are():
    with pytest.raises(
        DataError, match=r"<\|endoftext\|> before its end \(character 1\): these are"
    ):
        parse({"text": "a<|endoftext|>b<|endoftext|>"})
    with pytest.raises(DataError, match="already rendered as a chat"):
        parse({"text": "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>"})

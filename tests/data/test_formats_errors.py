"""The bad-input matrix: every row is an error with its location, or kept and counted."""

from __future__ import annotations

import pickle

import pytest

from qwen3_sft.chat.samples import Conversation, Dropped, PlainText, Tokens
from qwen3_sft.errors import DataError
from tests.support.data_rows import ANSWER, USER, answer, calling, chat, parse

ERRORS = [
    (chat(), "empty conversation"),
    (chat(USER), "no assistant turn"),
    ({"messages": None}, "must be a list of messages, found null"),
    ({"messages": "hi"}, "must be a list of messages, found str 'hi'"),
    ({"messages": ["hi"]}, r"messages\[0\] must be a message"),
    (chat(USER, {"role": "bot", "content": "a"}), r"messages\[1\] has role 'bot'; accepted are"),
    (chat(USER, {"role": ["user"], "content": "a"}), "has role"),
    ({"conversations": [{"from": "robot", "value": "x"}]}, r"conversations\[0\] has role 'robot'"),
    (chat({"content": "a"}), "needs either role and content"),
    (chat({"role": "user", "from": "human", "content": "a"}), "needs either role and content"),
    (answer(content=3), "found int 3"),
    (chat({"role": "user", "content": None}, ANSWER), r"messages\[0\] content must be a string"),
    (
        answer(content=[{"type": "image", "image": "x"}]),
        "a part of type 'image', which a text model",
    ),
    (answer(content=[{"type": "text", "text": None}]), "text part with none of"),
    (answer(content="a\ud83d"), "lone surrogate"),
    (chat({"role": "user", "content": "\udc00"}, ANSWER), "lone surrogate"),
    (calling({"x": "\ud800"}), "lone surrogate"),
    (answer(content="<think>a</think>b<think>c</think>d"), "two <think> blocks"),
    (answer(content="<think>a"), "without closing it"),
    (answer(content="<think>a</think>b</think>c"), "has </think> twice"),
    (answer(content="a</think>b</think>c"), "has </think> twice"),
    (answer(content="a<think>b</think>c"), "has text before <think>"),
    (answer(content="<think>a<think>b</think>c"), "without closing it"),
    (answer(content="<think>a</think>b", reasoning_content="c"), "keep one"),
    (answer(content="b", reasoning_content=["c"]), "reasoning_content must be a string"),
    (calling('{"a": '), "arguments of weather is not valid JSON"),
    (calling('{"a": NaN}'), "not valid JSON"),
    (calling("[1]"), "must be an object, found list"),
    (calling({"a": {1, 2}}), "cannot be written as JSON"),
    (answer(tool_calls=[{"id": "1"}]), "without a function name"),
    (answer(tool_calls=3), "tool_calls must be a list"),
    (chat({**USER, "tool_calls": [{"name": "f"}]}, ANSWER), "only an assistant calls tools"),
    (chat({"role": "tool", "content": "9"}, ANSWER), "tool result before any assistant"),
    (chat(USER, ANSWER, tools="[{"), "column 'tools' is not valid JSON"),
    (chat(USER, ANSWER, tools={"name": "f"}), "column 'tools' must be a list"),
    (chat(USER, ANSWER, tools=[{"function": {}}]), r"tools\[0\] must describe a function"),
    (chat({"role": "system", "content": "s"}, USER, ANSWER, system="t"), "both system messages"),
    ({"instruction": None, "output": "o"}, "must be a string, found null"),
    ({"instruction": "i", "output": "o", "history": [["x"]]}, r"history\[0\] must be"),
    ({"prompt": "p", "completion": [ANSWER]}, "both strings or both lists"),
    ({"prompt": [USER, ANSWER], "completion": [USER]}, "completion has no assistant turn"),
    ({"prompt": "p", "completion": None}, "column 'completion' must be a string, found null"),
    ({"prompt": "<|im_start|>user", "completion": "c"}, "already rendered"),
    ({"prompt": "p", "completion": "<think>r</think>c"}, "use `messages`"),
    ({"text": 3}, "column 'text' must be a string, found int 3"),
    ({"text": None}, "found null"),
    ({"text": "<|im_start|>a<|im_end|>\n"}, "already rendered as a chat; use `messages`"),
    ({"text": "\ud800"}, "lone surrogate"),
    ({"input_ids": [1, 8]}, "token 8, outside the vocabulary of 8"),
    ({"input_ids": [1, -1]}, "token -1, outside"),
    ({"input_ids": [1, 2**70]}, "no token id"),
    ({"input_ids": [1, 2.5]}, "only integers"),
    ({"input_ids": [True, False]}, "only integers"),
    ({"input_ids": "12"}, "must be a list of integers"),
    ({"input_ids": [1, 2], "labels": [1]}, "labels has 1 entries but input_ids has 2"),
    ({"input_ids": [1, 2], "labels": [1, -100]}, "all labels are -100"),
    ({"input_ids": [1, 2, 3], "labels": [2, 3, -100]}, "do not shift labels"),
]


@pytest.mark.parametrize(("row", "problem"), ERRORS)
def test_bad_rows_are_errors_with_location(row, problem):
    with pytest.raises(DataError, match=problem) as caught:
        parse(row, vocab_size=8)
    assert str(caught.value).startswith("f:1: ")
    str(caught.value).encode()


WARNINGS = [
    (chat(USER, USER, ANSWER), {"two user turns in a row": 1}),
    (chat(USER, ANSWER, ANSWER, ANSWER), {"two assistant turns in a row": 2}),
    (chat(USER, {"role": "system", "content": "s"}, ANSWER), {"system message not first": 1}),
    (chat(ANSWER, USER, ANSWER), {"conversation starts with an assistant turn": 1}),
    (answer(content="a\0"), {"NUL character": 1}),
    (chat({"role": "user", "content": " "}, ANSWER), {"empty user turn": 1}),
    (
        chat({"role": "user", "content": "what is <|im_end|>?"}, ANSWER),
        {"control-token text kept as plain text": 1},
    ),
    (
        answer(content="a </think> b", reasoning_content="r"),
        {"control-token text kept as plain text": 1},
    ),
    ({"text": "the <think> tag"}, {"control-token text kept as plain text": 1}),
]


@pytest.mark.parametrize(("row", "expected"), WARNINGS)
def test_odd_rows_are_kept_and_counted(row, expected):
    sample, warnings = parse(row)
    assert not isinstance(sample, Dropped)
    assert warnings == expected


def test_errors_survive_the_way_between_processes():
    error = pickle.loads(pickle.dumps(DataError("f:1: broken")))
    assert str(error) == "f:1: broken"


def test_any_value_in_any_place_gives_a_sample_or_a_data_error():
    odd = [
        None,
        "",
        "x",
        0,
        1.5,
        True,
        [],
        [None],
        [[]],
        {},
        {"a": None},
        b"x",
        float("nan"),
        "\ud800",
    ]
    places = {
        "messages": ["role", "content", "reasoning_content", "tool_calls"],
        "columns": ["tools", "system"],
    }
    for value in odd:
        rows = [chat(USER, {**ANSWER, key: value}) for key in places["messages"]]
        rows += [chat(USER, ANSWER, **{key: value}) for key in places["columns"]]
        rows += [answer(tool_calls=[value]), chat(USER, value), {"messages": value}, calling(value)]
        rows += [{"text": value}, {"input_ids": value}, {"input_ids": [1, 2], "labels": value}]
        rows += [{"prompt": value, "completion": "c"}, {"prompt": "p", "completion": value}]
        rows += [{"instruction": value, "output": "o"}, {"instruction": "i", "output": value}]
        rows += [{"instruction": "i", "output": "o", "history": value}]
        for row in rows:
            try:
                sample, _ = parse(row)
            except DataError as error:
                assert str(error).startswith("f:1: ")  # noqa: PT017
            else:
                assert isinstance(sample, Conversation | PlainText | Tokens | Dropped)

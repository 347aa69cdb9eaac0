"""No field of a row, a message, a part or a call passes without a meaning."""

from __future__ import annotations

import pytest

from qwen3_sft.chat.samples import Conversation, PlainText
from qwen3_sft.data.rows.source import Reading
from qwen3_sft.errors import DataError
from tests.support.data_rows import ANSWER, USER, answer, chat, parse

TOOL = {"type": "function", "function": {"name": "tide", "parameters": {}}}
ROWS = {
    "messages": chat(USER, ANSWER),
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "alpaca": {"instruction": "i", "output": "o"},
    "question_answer": {"question": "q", "answer": "a"},
    "prompt_completion": {"prompt": "p", "completion": "c"},
    "lists": {"prompt": [USER], "completion": [ANSWER]},
    "text": {"text": "t"},
    "tokens": {"input_ids": [1, 2]},
}
CHATS = [name for name in ROWS if name not in ("prompt_completion", "text", "tokens")]
METADATA = [
    "id", "uuid", "conversation_id", "prompt_id", "hash", "source", "data_source", "url", "license",
    "timestamp", "created_at", "score", "quality_score", "rating", "language", "lang", "category",
    "model", "metadata", "num_tokens", "__index_level_0__", "Unnamed: 0", "split", "difficulty",
]  # fmt: skip
NOT_ANSWERS = [
    ("chosen", "b", "a preference between answers"), ("rejected", "b", "a preference between"),
    ("rejected_response", "b", "a preference between"), ("rejected_messages", [1], "preference"),
    ("non_preferred_output", [1], "preference"), ("label", False, "a judgement whether the answer"),
    ("label", True, "KTO"), ("kto_tag", True, "KTO"), ("labels", "x", "KTO"),
    ("reward_model", {"a": 1}, "reinforcement|RL"), ("ground_truth", "4", "RL"), ("reward", 0.1, "RL"),
    ("images", ["a.jpg"], "media, and a text model sees none"), ("image", "a.jpg", "media"),
    ("videos", ["a"], "media"), ("audios", ["a"], "media"), ("video", "a", "media"),
    ("generations", ["b", "c"], "several answers to one prompt"), ("completions", ["b"], "several"),
    ("documents", ["d"], "chat template that Qwen's does not have"),
]  # fmt: skip


def ignoring(*names):
    return Reading(frozenset(names))


@pytest.mark.parametrize("fmt", ROWS)
def test_an_unknown_column_is_an_error_until_it_is_named(fmt):
    row = ROWS[fmt] | {"persona": "p", "context_hint": 3}
    with pytest.raises(
        DataError, match="unknown meaning: context_hint persona; .*--ignore_columns c"
    ):
        parse(row)
    sample, warnings = parse(row, reading=ignoring("persona", "context_hint"))
    plain, _ = parse(ROWS[fmt])
    assert str(sample) == str(plain)
    assert warnings == {"persona ignored as told": 1, "context_hint ignored as told": 1}


@pytest.mark.parametrize("fmt", ROWS)
@pytest.mark.parametrize("empty", [None, "", [], {}])
def test_an_empty_column_is_none(fmt, empty):
    for name in ("persona", "images", "rejected", "chat_template"):
        assert str(parse(ROWS[fmt] | {name: empty})[0]) == str(parse(ROWS[fmt])[0])


@pytest.mark.parametrize("fmt", ROWS)
def test_metadata_is_known(fmt):
    sample, warnings = parse(ROWS[fmt] | dict.fromkeys(METADATA, "x"))
    assert str(sample) == str(parse(ROWS[fmt])[0])
    assert not warnings


@pytest.mark.parametrize(("name", "value", "words"), NOT_ANSWERS)
def test_data_of_another_kind_is_refused_by_its_name(name, value, words):
    for fmt, row in ROWS.items():
        if fmt == "tokens" and name == "labels":
            continue
        with pytest.raises(DataError, match=f"^f:1: .*({words})"):
            parse(row | {name: value})


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {"prompt": "p", "chosen": "a", "rejected": "b"},
            "preference data.*--columns completion=cho",
        ),
        ({"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}, "messages=chosen"),
        (
            {"input": {"messages": []}, "preferred_output": [], "non_preferred_output": []},
            "preference",
        ),
        ({"prompt": [USER], "reward_model": {"ground_truth": "4"}, "data_source": "d"}, r"\(RL\)"),
        ({"prompt": [USER]}, "a prompt without an answer"),
        ({"prompt": "p", "solution": "s"}, "--columns question=prompt answer=solution"),
        ({"prompt": "p", "completions": ["a"], "labels": [True]}, "process reward model"),
        ({"prompt": "p", "label": 1}, "KTO"),
    ],
)
def test_rows_without_an_answer_are_named(row, words):
    with pytest.raises(DataError, match=f"^f:1: .*{words}"):
        parse(row)


PLACES = [
    (answer(content="a", colour="red"), r"messages\[1\] has fields of unknown.*: message.colour"),
    (chat({**USER, "colour": "red"}, ANSWER), r"messages\[0\] has .* message.colour"),
    (
        answer(content=[{"type": "text", "text": "a", "colour": 1}]),
        r"content\[0\] has .* part.colour",
    ),
    (answer(tool_calls=[{"name": "f", "colour": 1}]), "call of f has .* call.colour"),
    (answer(tool_calls=[{"function": {"name": "f"}, "colour": 1}]), "call of f has .* call.colour"),
    (answer(tool_calls=[{"function": {"name": "f", "colour": 1}}]), "call of f has .* call.colour"),
    (
        chat(USER, ANSWER, chat_template_kwargs={"colour": 1}),
        "chat_template_kwargs' has .* chat_template_kwargs.colour",
    ),
]


@pytest.mark.parametrize(("row", "words"), PLACES)
def test_an_unknown_field_at_any_place_is_an_error_until_it_is_named(row, words):
    with pytest.raises(DataError, match=f"^f:1: .*{words}; .*--ignore_columns") as caught:
        parse(row)
    name = str(caught.value).partition("--ignore_columns ")[2].partition(",")[0]
    sample, warnings = parse(row, reading=ignoring(name))
    assert isinstance(sample, Conversation)
    assert warnings == {f"{name} ignored as told": 1}


@pytest.mark.parametrize(
    "keys",
    [
        {"name": "n"}, {"id": "1"}, {"tool_call_id": "c"}, {"timestamp": 3}, {"annotations": [1]},
        {"finish_reason": "stop"}, {"usage": {"tokens": 3}}, {"language": "en", "toxic": False},
        {"refusal": None, "audio": None, "function_call": None},
    ],
)  # fmt: skip
def test_metadata_of_messages_is_known(keys):
    assert parse(chat({**USER, **keys}, {**ANSWER, **keys})) == parse(chat(USER, ANSWER))


def test_an_ignored_flag_does_nothing():
    row = chat(USER, {**ANSWER, "weight": 0.5})
    assert parse(row, reading=ignoring("message.weight"))[0] == parse(chat(USER, ANSWER))[0]
    assert (
        parse(chat(USER, ANSWER, label=False), reading=ignoring("label"))[0]
        == parse(chat(USER, ANSWER))[0]
    )


def test_a_copy_of_a_message_is_no_second_meaning():
    assert parse(chat(USER, ANSWER, prompt="q", answer=" a\n"))[0] == parse(chat(USER, ANSWER))[0]
    with pytest.raises(DataError, match="unknown meaning: answer prompt;"):
        parse(chat(USER, ANSWER, prompt="another", answer="third"))


@pytest.mark.parametrize("fmt", CHATS)
@pytest.mark.parametrize("name", ["system", "system_prompt", "system_message"])
def test_the_system_column_is_a_message(fmt, name):
    sample, _ = parse(ROWS[fmt] | {name: "be brief"})
    plain, _ = parse(ROWS[fmt])
    assert (sample.messages[0].role, sample.messages[0].content) == ("system", "be brief")
    assert sample.messages[1:] == plain.messages
    assert sample.first_trained == plain.first_trained + bool(plain.first_trained)


@pytest.mark.parametrize("fmt", CHATS)
@pytest.mark.parametrize("columns", [
    {"tools": [TOOL]}, {"tools": '[{"type": "function", "function": {"name": "tide", '
                                 '"parameters": {}}}]'},
    {"functions": [TOOL["function"]]}, {"tools": [TOOL], "functions": [TOOL["function"]]},
])  # fmt: skip
def test_tools_are_honoured_in_every_chat(fmt, columns):
    assert parse(ROWS[fmt] | columns)[0].tools == (TOOL,)


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
@pytest.mark.parametrize("column", [
    {"system": "s"}, {"tools": [TOOL]}, {"functions": [TOOL]}, {"history": [["a", "b"]]},
    {"enable_thinking": False}, {"chat_template_kwargs": {"enable_thinking": True}},
])  # fmt: skip
def test_plain_text_has_no_place_for_what_belongs_to_chats(fmt, column):
    with pytest.raises(DataError, match=f"column '{next(iter(column))}' has no place beside plain"):
        parse(ROWS[fmt] | column)
    assert isinstance(parse(ROWS[fmt])[0], PlainText)


@pytest.mark.parametrize("fmt", CHATS)
@pytest.mark.parametrize(
    ("columns", "mode"),
    [
        ({"enable_thinking": False}, False), ({"enable_thinking": True}, True),
        ({"enable_thinking": "false"}, False), ({"enable_thinking": 1}, True), ({}, None),
        ({"chat_template_kwargs": {"enable_thinking": True}}, True),
        ({"chat_template_kwargs": '{"enable_thinking": false}'}, False),
        ({"chat_template_kwargs": {"enable_thinking": None, "xml_tools": []}}, None),
    ],
)  # fmt: skip
def test_the_mode_of_a_row_is_kept(fmt, columns, mode):
    assert parse(ROWS[fmt] | columns)[0].enable_thinking is mode


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (answer(content="<think>r</think>a") | {"enable_thinking": False}, "false but an answer has"),
        (answer(content="a", reasoning="r") | {"enable_thinking": False}, "false but an answer has"),
        (chat(USER, ANSWER, enable_thinking="perhaps"), "set it to true or false"),
        (chat(USER, ANSWER, enable_thinking=True, chat_template_kwargs={"enable_thinking": False}),
         "contradict each other"),
        (chat(USER, ANSWER, chat_template_kwargs=[1]), "must be an object, found list"),
        (chat(USER, ANSWER, system="s", system_prompt="t"), "differ; keep one system prompt"),
        (chat({"role": "system", "content": "s"}, USER, ANSWER, system="t"), "both system messages"),
    ],
)  # fmt: skip
def test_contradictions_are_refused(row, words):
    with pytest.raises(DataError, match=f"^f:1: .*{words}"):
        parse(row)


def test_columns_of_other_formats_are_no_data_once_one_is_chosen():
    row = {"instruction": "i", "output": "o", "text": "rendered", "messages": None}
    assert parse({k: row[k] for k in ("instruction", "output")})[0] == parse_as(row, "alpaca")


def parse_as(row, fmt):
    from collections import Counter

    from qwen3_sft.data.formats import parse_row

    return parse_row(row, fmt, "f:1", Counter(), reading=Reading(is_chosen=True))

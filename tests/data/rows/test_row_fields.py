"""No field of a row, a message, a part or a call passes without a meaning."""

from __future__ import annotations

from collections import Counter

import pytest

from qwen3_sft.chat.samples import Conversation
from qwen3_sft.data.formats import parse_row
from qwen3_sft.data.rows.source import Reading
from qwen3_sft.errors import DataError
from tests.support.data_rows import ANSWER, BY_FORMAT, USER, answer, chat, parse

METADATA = [
    "id",
    "uuid",
    "conversation_id",
    "prompt_id",
    "hash",
    "source",
    "data_source",
    "url",
    "license",
    "timestamp",
    "created_at",
    "score",
    "quality_score",
    "rating",
    "language",
    "lang",
    "category",
    "model",
    "metadata",
    "num_tokens",
    "__index_level_0__",
    "Unnamed: 0",
    "split",
    "difficulty",
]
NOT_ANSWERS = [
    ("chosen", "b", "a preference between answers"),
    ("rejected", "b", "a preference between"),
    ("rejected_response", "b", "a preference between"),
    ("rejected_messages", [1], "preference"),
    ("non_preferred_output", [1], "preference"),
    ("label", False, "a judgement whether the answer"),
    ("label", True, "KTO"),
    ("kto_tag", True, "KTO"),
    ("labels", "x", "KTO"),
    ("reward_model", {"a": 1}, "reinforcement|RL"),
    ("ground_truth", "4", "RL"),
    ("reward", 0.1, "RL"),
    ("images", ["a.jpg"], "media, and a text model sees none"),
    ("image", "a.jpg", "media"),
    ("videos", ["a"], "media"),
    ("audios", ["a"], "media"),
    ("video", "a", "media"),
    ("generations", ["b", "c"], "several answers to one prompt"),
    ("completions", ["b"], "several"),
    ("documents", ["d"], "chat template that Qwen's does not have"),
]


def ignoring(*names):
    return Reading(frozenset(names))


@pytest.mark.parametrize("fmt", BY_FORMAT)
def test_an_unknown_column_is_an_error_until_it_is_named(fmt):
    row = BY_FORMAT[fmt] | {"persona": "p", "context_hint": 3}
    with pytest.raises(
        DataError, match=r"unknown meaning: context_hint persona; .*--ignore_columns c"
    ):
        parse(row)
    sample, warnings = parse(row, reading=ignoring("persona", "context_hint"))
    plain, _ = parse(BY_FORMAT[fmt])
    assert str(sample) == str(plain)
    assert warnings == {"persona ignored as told": 1, "context_hint ignored as told": 1}


@pytest.mark.parametrize("fmt", BY_FORMAT)
@pytest.mark.parametrize("empty", [None, "", [], {}])
def test_an_empty_column_is_none(fmt, empty):
    for name in ("persona", "images", "rejected", "chat_template"):
        assert str(parse(BY_FORMAT[fmt] | {name: empty})[0]) == str(parse(BY_FORMAT[fmt])[0])


@pytest.mark.parametrize("fmt", BY_FORMAT)
def test_metadata_is_known(fmt):
    sample, warnings = parse(BY_FORMAT[fmt] | dict.fromkeys(METADATA, "x"))
    assert str(sample) == str(parse(BY_FORMAT[fmt])[0])
    assert not warnings


@pytest.mark.parametrize(("name", "value", "words"), NOT_ANSWERS)
def test_data_of_another_kind_is_refused_by_its_name(name, value, words):
    for fmt, row in BY_FORMAT.items():
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
        (chat(USER, answer="4"), "no assistant turn, but answer: this is an RL prompt"),
        (
            chat(USER, solution="4", ground_truth="4"),
            "but solution and ground_truth: this is an RL",
        ),
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
        {"name": "n"},
        {"id": "1"},
        {"tool_call_id": "c"},
        {"timestamp": 3},
        {"annotations": [1]},
        {"finish_reason": "stop"},
        {"usage": {"tokens": 3}},
        {"language": "en", "toxic": False},
        {"refusal": None, "audio": None, "function_call": None},
    ],
)
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


def test_columns_of_other_formats_are_no_data_once_one_is_chosen():
    row = {"instruction": "i", "output": "o", "text": "rendered", "messages": None}
    assert parse({k: row[k] for k in ("instruction", "output")})[0] == parse_as(row, "alpaca")


def parse_as(row, fmt):
    return parse_row(row, fmt, "f:1", Counter(), reading=Reading(is_chosen=True))

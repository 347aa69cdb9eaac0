"""What is metadata by its name is looked at: flags inside it, cut answers, where a prompt ends."""

from __future__ import annotations

import json

import pytest

from qwen3_sft.data.rows.source import Reading
from qwen3_sft.errors import DataError
from tests.support.data_rows import ANSWER, USER, answer, chat, parse

CONTAINERS = ["metadata", "meta", "extra_info", "info", "annotations"]
MEANT = [
    {"train": False},
    {"weight": 0},
    {"loss_weight": 0.5},
    {"masked": True},
    {"loss_mask": [0, 1]},
    {"deep": [{"er": {"is_trainable": False}}]},
    {"tools": [{"name": "f"}]},
    {"system_prompt": "Be brief."},
    {"enable_thinking": False},
]
HARMLESS = [
    {"train": True},
    {"weight": 1, "masked": False},
    {"loss_mask": [1, 1]},
    {"tools": [], "system_prompt": None},
    {"deep": {"system_prompt": "of a server"}},
    "weight",
    {"score": 0, "id": 1},
]


@pytest.mark.parametrize("value", MEANT, ids=str)
@pytest.mark.parametrize("name", CONTAINERS)
def test_a_flag_inside_metadata_is_not_lost(name, value):
    for held in (value, json.dumps(value)):
        with pytest.raises(
            DataError, match=rf"^f:1: column '{name}' with '.*--ignore_columns {name}"
        ):
            parse(chat(USER, ANSWER, **{name: held}))
        with pytest.raises(
            DataError, match=rf"^f:1: messages\[1\] has '{name}'.*ignore_columns message.{name}"
        ):
            parse(answer(content="a", **{name: held}))
    sample, _ = parse(chat(USER, ANSWER, **{name: value}), reading=Reading(frozenset({name})))
    assert sample == parse(chat(USER, ANSWER))[0]


@pytest.mark.parametrize("value", HARMLESS, ids=str)
def test_metadata_that_changes_nothing_stays_metadata(value):
    assert parse(answer(content="a", metadata=value)) == parse(answer(content="a"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("finish_reason", "length"),
        ("stop_reason", "max_tokens"),
        ("finish_reason", "content_filter"),
        ("end_turn", False),
        ("status", "incomplete"),
    ],
)
def test_an_answer_that_was_cut_is_not_learned_as_it_ends(field, value):
    with pytest.raises(DataError, match=rf"^f:1: messages\[1\] has '{field}' .*cut off"):
        parse(answer(content="a", **{field: value}))
    for good in ("stop", "tool_calls", "end_turn", "completed", True):
        assert parse(answer(content="a", **{field: good})) == parse(answer(content="a"))


@pytest.mark.parametrize("kind", ["thinking", "code", "console", "tool_use", "image", "refusal"])
def test_a_message_of_another_type_is_no_answer(kind):
    with pytest.raises(DataError, match=rf"^f:1: messages\[1\] has 'type' '{kind}'"):
        parse(answer(content="a", type=kind))
    assert parse(answer(content="a", type="message")) == parse(answer(content="a"))


@pytest.mark.parametrize(
    "name",
    ["label_ids", "target_ids", "sequence_ids", "document_ids", "seq_idx", "token_scores", "turns"],
)
def test_a_list_over_the_tokens_is_not_metadata(name):
    with pytest.raises(DataError, match=rf"^f:1: .*{name}"):
        parse({"input_ids": [1, 2, 3], name: [0, 0, 1]})


@pytest.mark.parametrize(
    "name",
    ["prompt_length", "prompt_tokens", "source_length", "num_prompt_tokens", "completion_length"],
)
@pytest.mark.parametrize("row", [{"input_ids": [1, 2, 3]}, {"text": "Q: a? A: b"}], ids=str)
def test_where_the_prompt_ends_is_not_metadata(row, name):
    with pytest.raises(DataError, match=rf"^f:1: column '{name}' tells the prompt from the answer"):
        parse({**row, name: 2})
    assert parse(chat(USER, ANSWER, **{name: 2})) == parse(chat(USER, ANSWER))


@pytest.mark.parametrize("split", ["test", "validation", "dev", "Eval"])
def test_a_row_of_a_test_split_is_not_trained(split):
    row = chat(USER, ANSWER, split=split)
    with pytest.raises(DataError, match=rf"^f:1: column 'split' is '{split}', and train is what"):
        parse(row, reading=Reading(split="train"))
    for reading in (Reading(split="train", ignored=frozenset({"split"})), Reading(split=split)):
        assert parse(row, reading=reading)[0] == parse(chat(USER, ANSWER))[0]
    assert parse(row, reading=Reading())[0] == parse(chat(USER, ANSWER))[0]


@pytest.mark.parametrize("split", ["train", "train_sft", "training", "part 3"])
def test_any_other_word_for_a_split_is_metadata(split):
    row = chat(USER, ANSWER, split=split)
    assert parse(row, reading=Reading(split="train"))[0] == parse(chat(USER, ANSWER))[0]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "better": "a", "worse": "b"},
        {"question": "q", "response_j": "a", "response_k": "b"},
        {"instruction": "i", "input": "", "output_1": "a", "output_2": "b", "preference": 1},
        {"prompt": "q", "response_0": "a", "response_1": "b", "safer_response_id": 0},
        {"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 1},
        {"conversation_a": [USER, ANSWER], "conversation_b": [USER, ANSWER], "winner": "model_a"},
        {"query": "q", "positive": ["a"], "negative": ["b"]},
    ],
    ids=lambda row: " ".join(row),
)
def test_preferences_are_named_under_any_of_their_names(row):
    with pytest.raises(DataError, match=r"^f:1: columns .*a preference between answers"):
        parse(row)


@pytest.mark.parametrize(
    ("row", "lost"),
    [
        ({"question": "Translate:", "input": "pear", "answer": "poire"}, "input"),
        ({"query": "Translate:", "context": "pear", "response": "poire"}, "context"),
        ({"prompt": [USER], "response": "a", "history": [["b", "c"]]}, "history"),
        ({"instruction": [USER], "input": "pear", "output": "poire"}, "input"),
    ],
)
def test_a_column_that_is_not_part_of_the_question_is_not_dropped(row, lost):
    with pytest.raises(DataError, match=rf"^f:1: .*unknown meaning: {lost};"):
        parse(row)
    if lost == "input" and "question" in row:
        with pytest.raises(DataError, match=r"^f:1: .*unknown meaning: input;"):
            parse(row, reading=Reading(is_chosen=True))


@pytest.mark.parametrize("column", ["question", "answer"])
def test_a_list_of_texts_is_several_and_never_joined(column):
    row = {"question": "q", "answer": "a"} | {column: ["Paris", "paris"]}
    with pytest.raises(DataError, match=rf"^f:1: column '{column}' is a list of 2 texts"):
        parse(row)

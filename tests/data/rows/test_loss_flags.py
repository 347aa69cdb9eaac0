"""Loss flags of messages and rows: honoured exactly, or refused by name."""

from __future__ import annotations

from collections import Counter

import pytest

from qwen3_sft.chat.render import render
from qwen3_sft.chat.samples import Conversation, Dropped
from qwen3_sft.data.rows.loss_flags import BY_FLAG
from qwen3_sft.errors import DataError
from tests.support.data_rows import chat, parse, trained_texts

LEARN = ["weight", "train", "loss", "loss_weight", "training", "trainable", "should_train"]
MASK = ["masked", "mask", "ignore_loss", "no_loss"]


def rounds(**flags):
    """Two rounds; the first answer has the flags."""
    return chat(
        {"role": "user", "content": "q1"},
        {"role": "assistant", "content": "bad", **flags},
        {"role": "user", "content": "q2"},
        {"role": "assistant", "content": "good"},
    )


def trained(row, train_on="assistant"):
    sample, warnings = parse(row)
    assert isinstance(sample, Conversation), sample
    assert not warnings
    samples = render(
        sample, "qwen3_instruct_2507", train_on=train_on, thinking="split_turns",
        train_empty_think=False, location="f:1", warnings=Counter(),
    )  # fmt: skip
    return [text.removesuffix("<|im_end|>") for one in samples for text in trained_texts(one)]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        *(({name: value}, ["good"]) for name in LEARN for value in (0, 0.0, False, "0", "false")),
        *(({name: value}, ["bad", "good"]) for name in LEARN for value in (1, 1.0, True, None)),
        *(({name: value}, ["good"]) for name in MASK for value in (1, True)),
        *(({name: value}, ["bad", "good"]) for name in MASK for value in (0, False)),
        ({"train": False, "weight": 0}, ["good"]),
        ({"masked": True, "loss": 0}, ["good"]),
    ],
)
def test_a_flag_of_a_message_is_honoured(flags, expected):
    assert trained(rounds(**flags)) == expected
    sharegpt = [
        {"from": m["role"], "value": m["content"], **{k: m[k] for k in flags if k in m}}
        for m in rounds(**flags)["messages"]
    ]
    assert trained({"conversations": sharegpt}) == expected


@pytest.mark.parametrize("name", ["message_loss_mask", "loss_mask", "weights"])
def test_a_mask_of_a_row_is_honoured(name):
    assert trained(rounds() | {name: [0, 0, 0, 1]}) == ["good"]
    assert trained(rounds() | {name: [False, True, False, False]}) == ["bad"]
    assert trained(rounds(weight=0) | {name: [0, 0, 0, 1]}) == ["good"]
    with_system = rounds() | {name: [0, 0, 0, 1], "system": "s"}
    assert trained(with_system) == ["good"]  # the mask counts the row's own messages


def test_the_last_answer_is_the_last_that_may_be_learned():
    row = rounds() | {"loss_mask": [0, 1, 0, 0]}
    assert trained(row, "last_assistant") == ["bad"]
    with pytest.raises(DataError, match=r"f:1: .*loss flags mask answers, but --train_on all"):
        trained(row, "all")


def test_calls_and_results_of_one_message_share_its_flag():
    parts = [{"type": "tool_result", "content": "4"}, {"type": "text", "text": "and now?"}]
    call = {"type": "tool_use", "name": "tide", "input": {}}
    row = chat(
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": [call]},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "a"},
        loss_mask=[0, 0, 0, 1],
    )
    assert trained(row) == ["a"]


@pytest.mark.parametrize(
    "row",
    [
        rounds() | {"weight": 0}, rounds() | {"sample_weight": 0.0}, rounds() | {"train": False},
        rounds() | {"message_loss_mask": [0, 0, 0, 0]},
        chat({"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}),
        {"prompt": "p", "completion": "c", "weight": 0}, {"text": "t", "train": "false"},
        {"instruction": "i", "output": "o", "weight": "0"}, {"input_ids": [1, 2], "weight": 0},
    ],
)  # fmt: skip
def test_a_row_without_labels_by_its_own_flags_is_left_out(row):
    assert parse(row)[0] == BY_FLAG
    assert isinstance(BY_FLAG, Dropped)


@pytest.mark.parametrize("row", [rounds(), {"text": "t"}, {"prompt": "p", "completion": "c"}])
@pytest.mark.parametrize("name", ["weight", "sample_weight", "train"])
def test_a_row_of_weight_one_is_a_row(row, name):
    assert parse(row | {name: 1})[0] == parse(row)[0]


ERRORS = [
    (rounds(weight=0.5), r"messages\[1\] weight is 0.5, but labels are on or off"),
    (rounds(weight=2), "weight is 2, but labels"),
    (rounds(weight=-1), "weight is -1, but labels"),
    (rounds(loss=1.37), "loss is 1.37"),
    (rounds(loss_mask=[0, 1]), r"messages\[1\] loss_mask is \[0, 1\]"),
    (rounds(train="maybe"), "train is 'maybe'"),
    (rounds(train=True, weight=0), "train: True and weight: 0|weight: 0 and train: True"),
    (rounds(masked=True, weight=1), "contradict each other"),
    (rounds(training_detail=[{"train": True}]), "'training_detail', which is a mask of parts"),
    (rounds() | {"weight": 0.3}, "column 'weight' is 0.3, but labels are on or off"),
    (rounds() | {"weight": 1, "train": False}, "contradict each other"),
    (rounds() | {"loss_mask": [0, 1]}, r"one 0 or 1 per message \(4\), found 2 entries"),
    (rounds() | {"loss_mask": [0, 0.5, 0, 1]}, r"loss_mask\[1\] is 0.5"),
    (rounds() | {"loss_mask": 1}, r"one 0 or 1 per message \(4\), found 1"),
    (rounds() | {"loss_mask": [1, 1, 0, 1]}, "labels on message 0, a user message"),
    (rounds(weight=1) | {"loss_mask": [0, 0, 0, 1]}, "message 1 has a loss flag that contradicts"),
    (rounds() | {"loss_mask": [0, 0, 0, 1], "message_loss_mask": [0, 1, 0, 1]}, "differ; keep one"),
    (rounds() | {"mask": "assistant"}, "the role without labels must be the user"),
    (
        chat(
            {"role": "user", "content": "q", "train": True}, {"role": "assistant", "content": "a"}
        ),
        r"messages\[0\] is a user message that asks for labels",
    ),
    (
        chat(
            {"role": "system", "content": "q", "masked": 0}, {"role": "assistant", "content": "a"}
        ),
        r"messages\[0\] is a system message that asks for labels",
    ),
    (
        chat({"role": "assistant", "content": [{"type": "text", "text": "a", "weight": 0}]}),
        r"content\[0\] is a part without loss, but a message is learned as a whole",
    ),
]


@pytest.mark.parametrize(("row", "message"), ERRORS)
def test_a_flag_that_cannot_be_kept_is_refused(row, message):
    with pytest.raises(DataError, match=f"^f:1: .*({message})"):
        parse(row)

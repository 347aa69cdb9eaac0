"""Messages written as a string, in whichever column and spelling, are messages and never a text."""

from __future__ import annotations

import json

import pytest

from qwen3_sft.chat.samples import PlainText
from qwen3_sft.data.rows.columns import named_columns
from qwen3_sft.errors import DataError
from tests.support.data_rows import ANSWER, USER, chat, parse

SPELLINGS = {
    "json": json.dumps,
    "indented": lambda turns: json.dumps(turns, indent=1),
    "python": str,
    "content first": lambda turns: json.dumps([dict(reversed(turn.items())) for turn in turns]),
    "sharegpt": lambda turns: json.dumps(
        [
            {"from": {"user": "human", "assistant": "gpt"}[t["role"]], "value": t["content"]}
            for t in turns
        ]
    ),
}


@pytest.mark.parametrize("spelled", SPELLINGS.values(), ids=SPELLINGS)
def test_messages_in_a_string_are_messages(spelled):
    expected = parse(chat(USER, ANSWER))[0].messages
    for row in (
        {"messages": spelled([USER, ANSWER])},
        {"prompt": spelled([USER]), "completion": spelled([ANSWER])},
        {"prompt": spelled([USER]), "completion": [ANSWER]},
        {"prompt": spelled([USER]), "response": "a"},
        {"instruction": spelled([USER]), "output": "a"},
    ):
        assert parse(row)[0].messages == expected


@pytest.mark.parametrize(
    "text", ['[{"name": "f", "from": 1}]', '[{"content": 1}]', "[1, 2]", "[link](from: here)", "[{"]
)
def test_a_text_that_holds_no_messages_stays_a_text(text):
    sample, _ = parse({"prompt": "p", "completion": text})
    assert isinstance(sample, PlainText)
    assert sample.completion == text


def test_a_mask_of_the_row_counts_the_messages_of_its_prompt():
    row = {"prompt": [USER, ANSWER, USER], "response": "a", "message_loss_mask": [0, 0, 0, 1]}
    assert parse(row)[0].masked == {1}


def test_calls_of_xlam_are_calls():
    row = {"id": 0, "query": "q", "tools": '[{"name": "f", "parameters": {}}]'}
    sample, _ = parse(row | {"answers": '[{"name": "f", "arguments": {"a": 1}}]'})
    assert [(call.name, call.arguments) for call in sample.messages[1].tool_calls] == [
        ("f", {"a": 1})
    ]
    with pytest.raises(DataError, match=r"^f:1: answers .*JSON"):
        parse(row | {"answers": ["Paris", "paris"]})


def test_functions_are_tools_wherever_they_stand():
    flat = [{"name": "f", "parameters": {}}]
    expected = parse(chat(USER, ANSWER, functions=flat))[0].tools
    system = {"role": "system", "content": "s"}
    part = {"role": "system", "content": [{"type": "functions", "functions": flat}]}
    assert parse(chat(system | {"functions": flat}, USER, ANSWER))[0].tools == expected
    assert parse(chat(part, USER, ANSWER))[0].tools == expected


def test_keys_of_messages_are_renamed_in_strings_and_never_onto_others():
    naming = named_columns(["message.content=utterance"])
    turns = [{"role": t["role"], "utterance": t["content"]} for t in (USER, ANSWER)]
    for held in (turns, json.dumps(turns), str(turns)):
        assert naming({"messages": held}, "f:1")["messages"] == [USER, ANSWER]
    both = chat(USER, ANSWER | {"utterance": "b"})
    with pytest.raises(DataError, match=r"^f:1: messages\[1\]: --columns message\.content=utter"):
        naming(both, "f:1")
    moved = named_columns(["message.content=utterance", "message.unused=content"])(both, "f:1")
    assert moved["messages"][1] == {"role": "assistant", "content": "b", "unused": "a"}


def test_a_key_that_no_message_has_is_told():
    naming = named_columns(["message.content=utterence"])
    rows = [{"messages": [{"role": "user", "utterance": "q"}]}]
    with pytest.raises(DataError, match=r"^f: .*no key of messages 'utterence'; they have role, u"):
        naming.check_found(rows, "f")

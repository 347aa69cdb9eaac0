"""Nulls that Arrow adds are absent keys, in whatever file they stand; nulls of people are data."""

from __future__ import annotations

import json
from collections import Counter

import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from qwen3_sft.data.formats import parse_row
from qwen3_sft.data.raw_rows import RowsRead, raw_rows
from qwen3_sft.data.readers import find_sources
from qwen3_sft.options.data_args import DataArguments
from tests.support.data_rows import parse


def call(name, arguments):
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}],
    }


def tool(name, **properties):
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


QUESTION = {"role": "user", "content": "q"}
TIDE = {
    "messages": [QUESTION, call("tide", {"port": "Rye"})],
    "tools": [tool("tide", port={"type": "string"})],
}
MOON = {
    "messages": [QUESTION, call("moon", {"day": 3})],
    "tools": [tool("moon", day={"type": "integer", "minimum": 1})],
}
PLAIN = {"messages": [QUESTION, {"role": "assistant", "content": "a"}], "tools": None}


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Return (arguments of the calls, tools) of each row of a file."""
    monkeypatch.chdir(tmp_path)

    def samples(name, **options):
        args = DataArguments(dataset=[name], **options)
        rows = list(raw_rows(find_sources(args), args, RowsRead()))
        parsed = [parse(row.content, reading=row.reading)[0] for row in rows]
        return [
            ([c.arguments for m in s.messages for c in m.tool_calls], list(s.tools)) for s in parsed
        ]

    return samples


@pytest.mark.parametrize("writer", ["jsonl", "json", "parquet", "arrow"])
@pytest.mark.parametrize("rows", [[TIDE, MOON], [TIDE, MOON, PLAIN], [PLAIN, PLAIN, MOON, TIDE]])
def test_nulls_that_datasets_adds_are_absent(read, writer, rows):
    dataset = Dataset.from_list(rows)
    match writer:
        case "jsonl":
            dataset.to_json("a.jsonl")
        case "json":
            dataset.to_json("a.json", lines=False)
        case "parquet":
            pq.write_table(dataset.data.table, "a.parquet")
        case "arrow":
            dataset.save_to_disk("a.arrow")
    if writer.startswith("json"):
        with open(f"a.{writer}", encoding="utf-8") as file:
            assert "null" in file.read()
    expected = [
        (
            [
                c["function"]["arguments"]
                for m in row["messages"]
                for c in m.get("tool_calls") or []
            ],
            row["tools"] or [],
        )
        for row in rows
    ]
    assert read(f"a.{writer}") == expected


def write(rows, name="a.jsonl"):
    with open(name, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("as_text", [False, True])
def test_nulls_that_only_some_rows_have_are_data(read, as_text):
    """A person wrote them: `day` is there in some calls alone, or is seldom null."""
    kinds = [{"port": "Rye", "day": None}, {"port": "Hull"}, {"port": "Deal", "day": 3}]
    given = [json.dumps(kind) if as_text else kind for kind in kinds]
    write([{"messages": [QUESTION, call("tide", arguments)]} for arguments in given])
    assert [arguments for (arguments,), _ in read("a.jsonl")] == kinds
    full = [{"port": "Rye", "day": None}, {"port": "Hull", "day": 1}, {"port": "Deal", "day": 3}]
    write([{"messages": [QUESTION, call("tide", arguments)]} for arguments in full])
    assert [arguments for (arguments,), _ in read("a.jsonl")] == full


def test_one_row_by_hand_keeps_its_null(read):
    row = {"messages": [QUESTION, call("tide", {"port": "Rye", "day": None})]}
    write([row])
    assert read("a.jsonl")[0][0] == [{"port": "Rye", "day": None}]


def test_nulls_that_every_row_has_are_arrows(read):
    """The struct holds both tools' keys, though the messages show no trace of it."""
    write(
        [
            {"messages": [QUESTION, call("tide", {"port": "Rye", "day": None})]},
            {"messages": [QUESTION, call("moon", {"port": None, "day": 3})]},
        ]
    )
    assert [a for a, _ in read("a.jsonl")] == [[{"port": "Rye"}], [{"day": 3}]]


def test_nulls_in_a_string_are_not_arrows(read):
    """A table may hold arguments as JSON, into which Arrow does not write."""
    kinds = [{"port": "Rye", "day": None}, {"port": "Hull"}]
    rows = [{"messages": [QUESTION, call("tide", json.dumps(kind))]} for kind in kinds]
    Dataset.from_list([*rows, PLAIN]).to_parquet("a.parquet")
    assert [a for a, _ in read("a.parquet")] == [[kind] for kind in kinds] + [[]]


def test_in_a_schema_only_values_can_be_null(read):
    made = tool("f", default={"type": "string", "default": None, "enum": ["a", None]}, other=None)
    made["function"]["parameters"]["required"] = None
    write([{"messages": PLAIN["messages"], "tools": [made]}])
    kept = tool("f", default={"type": "string", "default": None, "enum": ["a", None]})
    assert read("a.jsonl") == [([], [kept])]


def test_lists_keep_their_nulls_and_nested_structs_lose_theirs(read):
    one = {"a": {"x": 1, "y": None}, "b": [None, 1]}
    two = {"a": {"x": None, "y": 2}, "b": [None, 2]}
    write([{"messages": [QUESTION, call("f", kind)]} for kind in (one, two)])
    assert [a for a, _ in read("a.jsonl")] == [
        [{"a": {"x": 1}, "b": [None, 1]}],
        [{"a": {"y": 2}, "b": [None, 2]}],
    ]


def test_a_null_column_is_absent_in_any_format(read):
    row = {
        "instruction": "i",
        "input": None,
        "output": "o",
        "text": None,
        "messages": None,
        "chosen": None,
        "label": None,
        "images": None,
        "system": None,
        "tools": None,
    }
    write([row])
    args = DataArguments(dataset=["a.jsonl"])
    (found,) = raw_rows(find_sources(args), args, RowsRead())
    sample = parse_row(found.content, found.fmt, "f:1", Counter(), reading=found.reading)
    assert [message.content for message in sample.messages] == ["i", "o"]

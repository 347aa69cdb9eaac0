"""JSON says one thing only: no key twice, no endless nesting, nothing beside rows is lost."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from qwen3_sft.data.raw_rows import RowsRead, raw_rows
from qwen3_sft.data.readers import find_sources
from qwen3_sft.errors import DataError
from qwen3_sft.options.data_args import DataArguments
from tests.support.data_rows import answer, parse

TWICE = '{"text": "a", "text": "b"}'
ROW = '{"text": "c"}'


@pytest.fixture
def read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def read(content: str, name: str = "a.jsonl", **options):
        Path(name).write_text(content, encoding="utf-8")
        args = DataArguments(dataset=[name], **options)
        return list(raw_rows(find_sources(args), args, RowsRead()))

    return read


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("a.jsonl", f"{ROW}\n{TWICE}\n", "a.jsonl:2"),
        ("a.json", f"[{ROW},\n{TWICE}]", "a.json:2"),
        ("a.json", f"{ROW}\n{TWICE}", "a.json:2"),
        ("a.jsonl", f'{ROW}\n{{"m": [{{"a" : 1, "b": {{"x": "\\":", "x": 2}}}}]}}', "a.jsonl:2"),
    ],
)  # fmt: skip
def test_a_key_twice_is_an_error_or_a_dropped_row(read, name, content, place):
    with pytest.raises(DataError, match=rf"^{place}: cannot read this JSON: .* key '(text|x)' twi"):
        read(content, name)
    rows = read(content, name, on_bad_row="drop")
    assert [row.content.get("text") for row in rows] == ["c", None]
    assert "twice" in rows[1].problem


@pytest.mark.parametrize("arguments", ['{"a": 1, "a": 2}', "{'a': 1, 'a': 2}"])
def test_a_key_twice_in_a_string_is_an_error_too(arguments):
    row = answer(tool_calls=[{"name": "f", "arguments": arguments}])
    with pytest.raises(DataError, match=r"^f:1: messages\[1\] arguments of f .* the key 'a' twice"):
        parse(row)


@pytest.mark.parametrize("levels", [200, 900])
@pytest.mark.parametrize("place", ["arguments", "content", "tools", "metadata"])
def test_endless_nesting_is_an_error(read, place, levels):
    deep = '{"a":' * levels + "1" + "}" * levels
    calls = f'[{{"name": "f", "arguments": {deep if place == "arguments" else "{}"}}}]'
    result = deep if place == "content" else '"r"'
    tools = f'[{{"name": "f", "parameters": {deep}}}]' if place == "tools" else "[]"
    row = (
        f'{{"metadata": {deep if place == "metadata" else "{}"}, "tools": {tools}, "messages": ['
        f'{{"role": "user", "content": "q"}}, {{"role": "assistant", "tool_calls": {calls}}},'
        f'{{"role": "tool", "content": {result}}}, {{"role": "assistant", "content": "a"}}]}}'
    )
    with pytest.raises(DataError, match=r"^a\.jsonl:1: cannot read this JSON: nested more than"):
        read(row)


@pytest.mark.parametrize("text", ['{"a":' * 300 + "1" + "}" * 300, "{'a':" * 150 + "1" + "}" * 150])
def test_endless_nesting_in_a_string_is_an_error(text):
    with pytest.raises(DataError, match=r"^f:1: messages\[1\] arguments of f .*nested more than"):
        parse(answer(tool_calls=[{"name": "f", "arguments": text}]))


def test_what_is_no_row_is_dropped_in_every_layout(read):
    for name, content in (("a.json", f"[{ROW}, 5]"), ("a.jsonl", f"{ROW}\n5\n")):
        rows = read(content, name, on_bad_row="drop")
        assert [row.problem is None for row in rows] == [True, False]


def test_a_row_whose_columns_contradict_is_dropped_in_its_turn(read):
    bad = json.dumps({"custom_id": "1", "response": {"body": {"choices": []}}})
    rows = read(f"{ROW}\n{bad}\n", on_bad_row="drop")
    assert [row.problem is None for row in rows] == [True, False]
    with pytest.raises(DataError, match=r"^a\.jsonl:1: columns \['odd'\]"):
        read(f'{{"odd": 1}}\n{bad}\n')  # the first error is told


def test_what_stands_beside_a_list_of_rows_is_said_of_each(read):
    row = {"prompt": "q", "response": "a"}
    whole = {"version": "1", "name": "n", "description": "d", "total": 1, "system": "S"}
    (found,) = read(json.dumps(whole | {"data": [row]}), "a.json")
    assert found.content == {"system": "S", **row}
    (found,) = read(json.dumps(whole | {"data": [row | {"system": "T"}]}), "a.json")
    assert found.content == {"system": "T", **row}
    (found,) = read(json.dumps({"split": "test", "data": [row]}), "a.json")
    assert found.content["split"] == "test"


def test_blank_cells_say_nothing(read):
    rows = read("prompt,response,weight,enable_thinking,system\nq,a,,,\nq,,1,true,s\n", "a.csv")
    bare, blank = (parse({name: row.content[name] for name in row.content})[0] for row in rows)
    assert bare == parse({"prompt": "q", "response": "a"})[0]
    assert blank.reason == "a blank answer"


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_two_columns_of_one_name_are_refused(read, kind):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    if kind == "parquet":
        pyarrow.parquet.write_table(table, "x.parquet")
    else:
        with pa.OSFile("x.arrow", "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    args = DataArguments(dataset=[f"x.{kind}"])
    with pytest.raises(DataError, match=rf"^x\.{kind}: the column text is there twice"):
        list(raw_rows(find_sources(args), args, RowsRead()))

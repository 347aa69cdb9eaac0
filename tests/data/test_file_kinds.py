"""Files of every kind that is read, by any spelling of their ending."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma

import pyarrow as pa
import pytest

from qwen3_sft.data.raw_rows import RowsRead, raw_rows
from qwen3_sft.data.readers import find_sources
from qwen3_sft.errors import DataError
from qwen3_sft.options.data_args import DataArguments

ROWS = [{"instruction": "q", "output": 'Ä, "b"\nc'}, {"instruction": "q2", "output": "a2"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
CSV = 'instruction,output\nq,"Ä, ""b""\nc"\nq2,a2\n'.encode()


@pytest.fixture
def read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def rows(name, content, **options):
        (tmp_path / name).write_bytes(content)
        args = DataArguments(dataset=[name], **options)
        found = raw_rows(find_sources(args), args, RowsRead())
        return [(row.location, row.content) for row in found]

    return rows


def zstd(data):
    return pa.Codec("zstd").compress(data, asbytes=True)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.JSONL", LINES),
        ("a.ndjson", LINES),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)),
        ("a.JSONL.GZ", gzip.compress(LINES, mtime=0)),
        ("a.jsonl.zst", zstd(LINES)),
        ("a.jsonl.bz2", bz2.compress(LINES)),
        ("a.jsonl.xz", lzma.compress(LINES)),
        ("a.json.gz", gzip.compress(json.dumps(ROWS).encode(), mtime=0)),
        ("a.json", json.dumps({"data": ROWS}).encode()),
        ("a.json", json.dumps({"version": "1", "train": ROWS}, indent=1).encode()),
        ("a.jsonl", json.dumps(ROWS).encode()),
        ("a.jsonl", json.dumps(ROWS, indent=2).encode()),
        ("a.jsonl", "\n".join(json.dumps(row, indent=2) for row in ROWS).encode()),
        ("a.csv", CSV),
        ("a.CSV", b"\xef\xbb\xbf" + CSV),
        ("a.csv.gz", gzip.compress(CSV, mtime=0)),
        ("a.tsv", CSV.replace(b",", b"\t").replace("Ä\t".encode(), "Ä,".encode())),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rows_of_every_kind_of_file(read, name, content):
    assert [row for _, row in read(name, content)] == ROWS


def test_locations_are_those_of_the_file(read):
    assert [where for where, _ in read("a.jsonl.gz", gzip.compress(b"\n" + LINES, mtime=0))] == [
        "a.jsonl.gz:2",
        "a.jsonl.gz:3",
    ]
    assert [where for where, _ in read("a.csv", CSV)] == ["a.csv:3", "a.csv:4"]
    wrapped = json.dumps({"data": ROWS}).encode()
    assert [where for where, _ in read("a.json", wrapped)] == [
        "a.json:1 data[0]",
        "a.json:1 data[1]",
    ]


def test_messages_in_a_cell_are_json(read):
    cell = json.dumps([{"role": "user", "content": "q"}]).replace('"', '""')
    rows = read("a.csv", f'messages,id\n"{cell}",1\n'.encode())
    assert json.loads(rows[0][1]["messages"]) == [{"role": "user", "content": "q"}]


TEXT = b"The tide\nis high.\n\nThe moon\nis new.\n"


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ("file", [("a.txt:1", TEXT.decode())]),
        ("paragraph", [("a.txt:1", "The tide\nis high."), ("a.txt:4", "The moon\nis new.")]),
        (
            "line",
            [
                ("a.txt:1", "The tide"),
                ("a.txt:2", "is high."),
                ("a.txt:4", "The moon"),
                ("a.txt:5", "is new."),
            ],
        ),
    ],
)
def test_a_text_file_is_what_the_option_says(read, rows, expected):
    assert read("a.txt", TEXT, txt_rows=rows) == [
        (where, {"text": text}) for where, text in expected
    ]
    with pytest.raises(DataError, match=r"a\.txt: a \.txt file does not say.*--txt_rows to file"):
        read("a.txt", TEXT)


BAD = {
    "cells": (
        "a.csv",
        b"instruction,output\n1,2\n1,2,3\n",
        "a.csv:3: 3 cells, but the first line names 2",
    ),
    "header": ("a.csv", b"a,a\n1,2\n", "a.csv:1: the first line names a twice"),
    "quotes": ("a.csv", b'a,b\n"1"x,2\n', "a.csv:2: broken CSV"),
    "not utf-8": ("a.csv", b"a,b\n1,\xff\n", "a.csv:.*invalid UTF-8"),
    "not gzip": ("a.jsonl.gz", b"{}", "a.jsonl.gz: cannot be decompressed"),
    "cut gzip": (
        "a.jsonl.gz",
        gzip.compress(LINES * 99, mtime=0)[:-20],
        "a.jsonl.gz: cannot be decompressed",
    ),
    "not zstd": ("a.jsonl.zst", b"{}{}{}{}", "a.jsonl.zst: cannot be decompressed"),
    "packed parquet": ("a.parquet.gz", b"", "a.parquet.gz: unknown kind of file '.parquet.gz'"),
    "zip": ("a.zip", b"PK", "a.zip: unknown kind of file '.zip'; accepted are .jsonl, .*.gz"),
    "broken second line": ("a.jsonl", LINES + b"{", "a.jsonl:3:2: broken JSON"),
    "broken first line": ("a.jsonl", b'{"a": }\n' + LINES, "a.jsonl:1:7: broken JSON"),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD.values(), ids=BAD)
def test_a_broken_file_is_named(read, name, content, message):
    with pytest.raises(DataError, match=f"^{message}"):
        read(name, content)


def test_columns_are_renamed(read):
    row = {"ask": "q", "reply": "a", "persona": "p"}
    options = {"columns": ["question=ask", "answer=reply"], "ignore_columns": ["persona"]}
    assert read("a.json", json.dumps([row]).encode(), **options)[0][1] == {
        "question": "q",
        "answer": "a",
        "persona": "p",
    }
    turns = [{"speaker": "user", "says": "q", "content": None}]
    found = read(
        "a.json",
        json.dumps([{"turns": turns}]).encode(),
        columns=["messages=turns", "message.role=speaker", "message.value=says"],
    )
    assert found[0][1] == {"messages": [{"role": "user", "value": "q", "content": None}]}
    assert read("a.json", b'[{"Question": "q", "Response": "a"}]')[0][1] == {
        "question": "q",
        "response": "a",
    }


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["question"], "--columns question: write KNOWN=NAME"),
        (["question=ask", "prompt=ask"], "--columns prompt=ask: one of its names occurs twice"),
        (["question=nothing"], "a.json: --columns question=nothing, but its first rows have no"),
        (["answer=ask"], "a.json:1: --columns answer=ask, but the row has a column 'answer' too"),
    ],
)
def test_a_wrong_name_is_told(read, columns, message):
    with pytest.raises(DataError, match=f"^{message}"):
        read("a.json", b'[{"ask": "q", "answer": "a"}]', columns=columns)


def test_requests_to_a_server_are_unwrapped(read):
    messages = [{"role": "user", "content": "q"}]
    answer = {"role": "assistant", "content": "a"}
    request = {
        "custom_id": "1",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "m", "messages": [*messages, answer], "temperature": 0},
    }
    assert read("a.jsonl", json.dumps(request).encode())[0][1]["messages"] == [*messages, answer]
    choice = {"index": 0, "message": answer, "finish_reason": "stop"}
    response = {"status_code": 200, "body": {"choices": [choice]}}
    joined = {**request, "body": {"messages": messages}, "response": response, "error": None}
    assert read("a.jsonl", json.dumps(joined).encode())[0][1]["messages"] == [*messages, answer]
    alone = {"custom_id": "1", "response": response, "error": None}
    with pytest.raises(
        DataError, match="a server's answer without its request; join the two files"
    ):
        read("a.jsonl", json.dumps(alone).encode())

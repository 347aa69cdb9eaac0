"""Processes that read their own stretches of a file: the same rows, numbers, places and errors."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest

from qwen3_sft.data.files.line_ranges import line_ranges
from qwen3_sft.data.prepare import prepare
from qwen3_sft.data.raw_rows import RawRow, RowRange, RowsRead, raw_rows, rows_or_ranges
from qwen3_sft.data.readers import find_sources
from qwen3_sft.data.tally import Tally
from qwen3_sft.errors import DataError
from qwen3_sft.options.data_args import DataArguments
from tests.support.data_rows import chat


def row(number: int) -> str:
    answer = {"role": "assistant", "content": f"answer {number} \u2028 \x85 é"}
    return json.dumps(chat({"role": "user", "content": "q"}, answer), ensure_ascii=False)


def lines_of_all_kinds(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    lines = []
    for number in range(count):
        lines += rng.choices(["", "  ", "\t", "\x0b"], k=rng.choice([0, 0, 0, 1, 3]))
        lines.append(row(number))
    return lines


def read(args, *, in_ranges):
    """All that is learnt of the rows, as comparable values."""
    found = RowsRead()
    rows, ranges = [], 0
    try:
        for item in rows_or_ranges(find_sources(args), args, found, in_ranges=in_ranges):
            ranges += isinstance(item, RowRange)
            rows += item.rows() if isinstance(item, RowRange) else [item]
    except DataError as error:
        rows.append(str(error))
    return rows, found.warnings.to_dict(), found.formats, found.first_rows, ranges


def same(args) -> list[RawRow]:
    *alone, none = read(args, in_ranges=False)
    *ranged, some = read(args, in_ranges=True)
    if isinstance(alone[0][-1], str):  # an error: what comes after it does not count
        ranged, alone = ranged[:1], alone[:1]
    assert ranged == alone
    assert none == 0
    assert some > 0
    return alone[0]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("start", ["", "\ufeff", "\ufeff\n\n"])
@pytest.mark.parametrize("last", ["", "\n", "\n\n \n"])
def test_rows_of_files_as_they_are_written(tmp_path, start, end, last):
    file = tmp_path / "a.jsonl"
    file.write_text(start + end.join(lines_of_all_kinds(900)) + last, "utf-8", newline="")
    rows = same(DataArguments(dataset=[str(file)]))
    assert [r.number for r in rows] == [*range(900)]
    assert [r.content["messages"][1]["content"].split()[1] for r in rows] == [*map(str, range(900))]


@pytest.mark.parametrize("limit", [257, 512, 513, 700, 1300, 5000])
def test_limits_and_mixtures(tmp_path, limit):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines_of_all_kinds(800)), "utf-8")
    (tmp_path / "c.jsonl").write_text("\n".join(map(row, range(40))), "utf-8")
    names = [str(tmp_path / f"{name}.jsonl") for name in "abc"]
    rows = same(DataArguments(dataset=names, max_rows=limit))
    assert len(rows) == min(limit, 1640)
    entries = [{"path": names[0], "max_rows": limit}, {"path": names[2]}, {"path": names[1]}]
    rows = same(DataArguments(dataset=[json.dumps(entry) for entry in entries]))
    assert len(rows) == min(limit, 800) + 40 + 800


BAD = {
    "broken": "{",
    "no object": "[1]",
    "unknown": '{"chosen": "a", "rejected": "b"}',
    "other format": '{"text": "t"}',
    "not UTF-8": b'{"text": "\xff"}',
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
@pytest.mark.parametrize("on_bad_row", ["error", "drop"])
def test_bad_rows(tmp_path, bad, on_bad_row):
    file = tmp_path / "a.jsonl"
    lines = [line.encode() for line in lines_of_all_kinds(700)]
    lines[850:850] = [bad if isinstance(bad, bytes) else bad.encode()]
    file.write_bytes(b"\n".join(lines))
    rows = same(DataArguments(dataset=[str(file)], on_bad_row=on_bad_row))
    if on_bad_row == "error":
        assert rows[-1].startswith(f"{file}:851")
    else:
        assert [r.location for r in rows if r.problem] == [f"{file}:851"]


def test_renamed_columns_and_nulls_of_the_whole_file(tmp_path):
    file = tmp_path / "a.jsonl"
    rows = [{"Q": "q", "A": f"a{number}", "id": None} for number in range(600)]
    file.write_text("\n".join(map(json.dumps, rows)))
    same(DataArguments(dataset=[str(file)], columns=["question=Q", "answer=A"]))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json", "pretty.jsonl", "small.jsonl"])
def test_other_files_are_read_as_before(tmp_path, name):
    file, lines = tmp_path / name, [row(number) for number in range(300)]
    if name == "a.jsonl.gz":
        file.write_bytes(gzip.compress("\n".join(lines).encode()))
    elif name == "small.jsonl":
        file.write_text("\n".join(lines[:256]), "utf-8")
    else:
        file.write_text("\n".join(json.dumps(json.loads(line), indent=1) for line in lines))
    *ranged, ranges = read(DataArguments(dataset=[str(file)]), in_ranges=True)
    *alone, _ = read(DataArguments(dataset=[str(file)]), in_ranges=False)
    assert ranged == alone
    assert ranges == 0


def test_a_range_is_bounded_in_bytes(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps({"text": "x" * 1_000_000}) for _ in range(20)))
    ranges = list(line_ranges(file, 0, None, Tally()))
    assert sum(r.rows for r in ranges) == 20
    assert max(r.end - r.start for r in ranges) < 6 << 20


def test_what_is_written_and_reported_is_the_same(tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = lines_of_all_kinds(900)
    lines[1000:1000] = ["{broken", '{"messages": []}']
    Path("data.jsonl").write_text("\n".join(lines), "utf-8")
    made = [
        prepare(
            DataArguments(
                dataset=["data.jsonl@2"], num_proc=n, data_cache_dir=f"cache{n}",
                on_bad_row="drop", max_drop_fraction=0.1,
            ),
            tokenizer,
        )
        for n in (1, 2)
    ]  # fmt: skip
    for name in ("ids", "trained", "offsets", "rows"):
        one, two = ((d.folder / f"{name}.npy").read_bytes() for d in made)
        assert one == two
    one, two = ({**d.report, "seconds": 0} for d in made)
    assert one == two
    assert [entry["location"] for entry in one["dropped"]] == ["data.jsonl:1001", "data.jsonl:1002"]


@pytest.mark.parametrize("num_proc", [1, 2])
def test_the_first_error_in_the_order_of_the_rows(tmp_path, tokenizer, num_proc):
    """One of reading comes after one of a row before it, also within one chunk."""
    file = tmp_path / "a.jsonl"
    lines = [row(number) for number in range(700)]
    lines[400:400] = ['{"messages": []}', "{broken"]
    args = DataArguments(
        dataset=[str(file)], num_proc=num_proc, data_cache_dir=str(tmp_path / "cache")
    )
    file.write_text("\n".join(lines), "utf-8")
    with pytest.raises(DataError, match=r"a.jsonl:401: empty conversation"):
        prepare(args, tokenizer)
    del lines[400]
    file.write_text("\n".join(lines), "utf-8")
    with pytest.raises(DataError, match=r"a.jsonl:401:2: broken JSON"):
        prepare(args, tokenizer)


def test_raw_rows_has_no_ranges(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(map(row, range(600))), "utf-8")
    args = DataArguments(dataset=[str(file)])
    assert len(list(raw_rows(find_sources(args), args, RowsRead()))) == 600

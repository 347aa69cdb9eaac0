from __future__ import annotations

import json
import logging
import os

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qwen3_sft.data import json_rows
from qwen3_sft.data.files.datasets_rows import HubSource
from qwen3_sft.data.raw_rows import RowsRead, raw_rows
from qwen3_sft.data.readers import find_sources
from qwen3_sft.data.tally import Tally
from qwen3_sft.errors import DataError
from qwen3_sft.options.data_args import DataArguments
from tests.support.data_rows import read_rows

ROWS = [{"text": f"row {i}", "nested": {"list": [i, i + 1]}} for i in range(7)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder, so that locations are short."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(*names: str, **options):
    return read_rows(DataArguments(dataset=list(names), **options))


def write_arrow(path, *, stream: bool) -> None:
    table = pa.Table.from_pylist(ROWS)
    make = pa.ipc.new_stream if stream else pa.ipc.new_file
    with make(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)


def test_jsonl(folder):
    lines = [json.dumps(row) for row in ROWS]
    text = "\ufeff" + lines[0] + "\n\n" + "\r\n".join(lines[1:]) + "\n  \n"
    (folder / "a.jsonl").write_bytes(text.encode())
    tally = Tally()
    rows = read_rows(DataArguments(dataset=["a.jsonl"]), tally)
    assert [row for _, row in rows] == ROWS
    assert [location for location, _ in rows] == ["a.jsonl:1"] + [
        f"a.jsonl:{i}" for i in range(3, 9)
    ]
    assert tally.to_dict() == {"blank line skipped": {"count": 2, "first": "a.jsonl:2"}}


@pytest.mark.parametrize("window", [1, 2, 3, 10, 1 << 20])
@pytest.mark.parametrize("layout", ["array", "array indented", "lines", "one", "objects indented"])
def test_json_layouts_through_any_window(folder, monkeypatch, layout, window):
    monkeypatch.setattr(json_rows, "_WINDOW", window)
    rows = [{"text": 'é\\"\n😀', "n": [1, {"a": None}]}, {}, {"é": False}]
    text, lines = {
        "array": (json.dumps(rows, ensure_ascii=False), [1, 1, 1]),
        "array indented": (json.dumps(rows, indent=2), [2, 11, 12]),
        "lines": ("\n".join(json.dumps(row) for row in rows), [1, 2, 3]),
        "one": (json.dumps(rows[0], indent=1), [1]),
        "objects indented": ("\n\n".join(json.dumps(row, indent=1) for row in rows), [1, 11, 13]),
    }[layout]
    (folder / "a.json").write_text("\ufeff" + text + " \n", encoding="utf-8")
    expected = rows[: len(lines)]
    assert read("a.json") == [(f"a.json:{n}", row) for n, row in zip(lines, expected, strict=True)]


def test_json_memory_follows_the_row_and_not_the_file(folder, monkeypatch):
    monkeypatch.setattr(json_rows, "_WINDOW", 4096)
    (folder / "a.json").write_text(json.dumps([{"text": "x" * 1000}] * 1000), encoding="utf-8")
    sizes = []
    grow = json_rows._Window._grow
    monkeypatch.setattr(
        json_rows._Window, "_grow", lambda self: (grow(self), sizes.append(len(self._text)))
    )
    assert len(read("a.json")) == 1000
    assert max(sizes) < 4 * 4096


@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow", "file.arrow"])
def test_tables(folder, monkeypatch, name):
    monkeypatch.setattr("qwen3_sft.data.files.table_rows._BATCH_ROWS", 2)
    if name == "a.parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), name, row_group_size=3)
    else:
        write_arrow(name, stream=name.startswith("stream"))
    assert read(name) == [(f"{name}:row {i}", row) for i, row in enumerate(ROWS, 1)]


def test_folder_is_read_in_order_of_names(folder):
    (folder / "d/sub").mkdir(parents=True)
    (folder / "d/.hidden").mkdir()
    for name in ("d/b.jsonl", "d/a.json", "d/sub/c.jsonl", "d/.hidden/x.jsonl"):
        (folder / name).write_text(json.dumps({"name": name}))
    (folder / "d/README.md").write_text("about")
    (folder / "d/dataset_infos.json").write_text("{}")
    assert [row["name"] for _, row in read("d")] == ["d/a.json", "d/b.jsonl", "d/sub/c.jsonl"]


def test_max_rows_counts_over_all_files(folder):
    for name in ("a.jsonl", "b.jsonl"):
        (folder / name).write_text('{"text": "x"}\n{"text": "y"}\n')
    args = DataArguments(dataset=["a.jsonl", "b.jsonl"], max_rows=3)
    rows = list(raw_rows(find_sources(args), args, RowsRead()))
    assert [row.location for row in rows] == ["a.jsonl:1", "a.jsonl:2", "b.jsonl:1"]
    assert [row.number for row in rows] == [0, 1, 2]


def test_saved_datasets(folder):
    train = datasets.Dataset.from_list(ROWS)
    train.select([2, 0]).with_format("torch").save_to_disk("one")
    assert read("one") == [("one:row 1", ROWS[2]), ("one:row 2", ROWS[0])]
    datasets.DatasetDict(train=train, test=train.select([5])).save_to_disk("both")
    assert [row for _, row in read("both")] == ROWS
    assert [row for _, row in read("both", dataset_split="test")] == [ROWS[5]]
    assert [row for _, row in read("both:test")] == [ROWS[5]]
    with pytest.raises(DataError, match="no split 'dev'; it has test, train"):
        read("both:dev")


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_source_loads_with_datasets(folder, streaming):
    # `datasets` loads a folder as it loads a hub repository, which needs a network.
    (folder / "repo").mkdir()
    pq.write_table(pa.Table.from_pylist(ROWS), "repo/train.parquet")
    source = HubSource(str(folder / "repo"), "train", None, None, streaming, "")
    assert [row for _, row in source.rows(Tally())] == ROWS
    assert next(source.rows(Tally()))[0].endswith("repo:train:row 1")
    if not streaming:
        assert source.identity(str) == source.dataset._fingerprint


def test_hub_names_and_splits(monkeypatch, folder):
    args = DataArguments(dataset=["org/name:test", "org/name"], dataset_revision="abc")
    named, default = (source.reader for source in find_sources(args))
    assert (named.hub_id, named.split, named.revision) == ("org/name", "test", "abc")
    assert default.split == "train"


def test_dataset_scripts_are_refused(folder):
    (folder / "scripted").mkdir()
    (folder / "scripted/scripted.py").write_text("raise SystemExit('this code ran')")
    source = HubSource(str(folder / "scripted"), "train", None, None, False, "")
    with pytest.raises(DataError, match="scripted"):
        source.rows(Tally())


def test_unknown_hub_id_offline(folder, monkeypatch, caplog):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    caplog.set_level(logging.ERROR)
    with pytest.raises(DataError, match="no/such:train: neither a file or folder here nor"):
        read("no/such")


BROKEN = {
    # Python 3.13 points at the comma, earlier versions behind it.
    "broken line": ("a.jsonl", b'{"a": 1}\n{"a": 1,}\n', r"a\.jsonl:2:[89]: broken JSON"),
    "cut line": ("a.jsonl", b'{"a": 1}\n{"a": "x', r"a\.jsonl:2:7: broken JSON: Unterminated"),
    "line of NUL bytes": ("a.jsonl", b'{"a": 1}\n\0\0\0', r"a\.jsonl:2:1: broken JSON"),
    "invalid UTF-8": ("a.jsonl", b'\n{"a": "\xff"}\n', r"a\.jsonl:2:8: invalid UTF-8 \(byte 0xff"),
    "list in a line": ("a.jsonl", b"{}\n[{}]\n", r"a\.jsonl:2: a row must be .* found list"),
    "number in a line": ("a.jsonl", b"{}\n5\n", r"a\.jsonl:2: a row must be .* found int 5"),
    "huge number": ("a.jsonl", b'{"a": ' + b"1" * 5000 + b"}", r"a\.jsonl:1: .*cannot read"),
    "deep nesting": ("a.jsonl", b'{"a": ' + b"[" * 10**6, r"a\.jsonl:1: .*cannot read"),
    "broken array": ("a.json", b'[\n {"a": 1},\n {"a" 1}\n]', r"a\.json:3:7: broken JSON"),
    "trailing comma": ("a.json", b'[{"a": 1},\n]', r"a\.json:2:1: broken JSON"),
    "no comma": ("a.json", b'[{"a": 1}\n{"a": 1}]', r"a\.json:2:1: broken JSON: expected '\]'"),
    "cut array": ("a.json", b'[{"a": 1},\n {"a": "x', r"a\.json:2:8: broken JSON: Unterminated"),
    "no end": ("a.json", b'[{"a": 1}\n', r"a\.json:2:1: broken JSON: the file ends here"),
    "text after": ("a.json", b'[{"a": 1}]\n{}', r"a\.json:2:1: .*text after the end"),
    "string element": ("a.json", b'[{},\n\n "x"]', r"a\.json:3: a row must be .* found str"),
    "array of invalid UTF-8": ("a.json", b'[{},\n{"a": "\xc3"}]', r"a\.json:2:8: invalid UTF-8"),
    "cut character": ("a.json", b'[{"a": "\xc3', r"a\.json:1:9: invalid UTF-8"),
    "no parquet": ("a.parquet", b"PAR1 no", r"a\.parquet: cannot read this table"),
    "empty parquet": ("a.parquet", b"", r"a\.parquet: cannot read this table"),
    "no arrow": ("a.arrow", b"no arrow at all", r"a\.arrow: cannot read this table"),
    "unknown kind": ("a.doc", b"a,b\n", r"a\.doc: unknown kind of file '\.doc'; accepted .*jsonl"),
}


@pytest.mark.parametrize(("name", "content", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_files_are_named_with_line_and_column(folder, name, content, message):
    (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=f"^{message}"):
        read(name)


def test_a_syntax_error_does_not_read_the_rest_of_a_huge_file(folder, monkeypatch):
    monkeypatch.setattr(json_rows, "_WINDOW", 1000)
    (folder / "a.json").write_text('[{"a": 1}, {"a" 1}, ' + " " * 1_000_000 + "]")
    sizes = []
    grow = json_rows._Window._grow
    monkeypatch.setattr(
        json_rows._Window, "_grow", lambda self: (grow(self), sizes.append(len(self._text)))
    )
    with pytest.raises(DataError, match=r"a\.json:1:17: broken JSON"):
        read("a.json")
    assert sum(sizes) == 1000


def test_text_in_a_table_that_is_not_utf8(folder):
    text = pa.array([b"fine", b"bad \xff"]).view(pa.string())
    pq.write_table(pa.table({"text": text}), "a.parquet")
    with pytest.raises(DataError, match=r"^a\.parquet:row 2: invalid UTF-8"):
        read("a.parquet")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("trian.jsonl", r"trian\.jsonl: no such file or folder; did you mean .*/train\.jsonl\?"),
        ("data/sub/x.json", r"data/sub/x\.json: no such file .*did you mean .*/data1\?"),
        ("./nothing", r"nothing: no such file"),
        ("empty", r"empty: no .*file in this folder"),
        ("mixed", r"mixed: no .*file in this folder; it has x\.doc"),
    ],
)
def test_missing_sources(folder, name, message):
    (folder / "train.jsonl").touch()
    for made in ("empty", "data1", "mixed"):
        (folder / made).mkdir()
    (folder / "mixed/x.doc").touch()
    with pytest.raises(DataError, match=message):
        read(name)


def test_no_source_at_all():
    with pytest.raises(DataError, match="set --dataset"):
        read()
    with pytest.raises(DataError, match="set --eval_dataset"):
        find_sources(DataArguments(dataset=["x"]), eval=True)


# ---- what cannot be read ----


def test_what_is_neither_file_nor_folder(folder):
    os.mkfifo("pipe.jsonl")
    (folder / "link.jsonl").symlink_to("nowhere")
    for name in ("pipe.jsonl", "link.jsonl", "/dev/null"):
        with pytest.raises(DataError, match=f"^{name}: neither a file nor a folder, but a pipe"):
            read(name)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_a_file_that_the_machine_does_not_give(folder, name):
    """As a disk that fails, or permissions, which a test that root runs cannot take away."""
    (folder / name).symlink_to("/proc/self/mem")
    with pytest.raises(DataError, match=f"^{name}: Input/output error"):
        read(name)


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow"])
@pytest.mark.parametrize("content", [b"", b"PAR1PAR1", b"ARROW1ARROW1", b"\x1f\x8bzipped", b"no"])
def test_a_table_that_is_none(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=f"^{name}: cannot read this table: "):
        read(name)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "latin-1"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_another_encoding(folder, name, encoding):
    (folder / name).write_bytes('{"text": "\u00e4"}'.encode(encoding))
    with pytest.raises(DataError, match=rf"^{name}:1:\d+: invalid UTF-8"):
        read(name)


@pytest.mark.parametrize(
    "state", ["{", "[]", "3", '{"_data_files": 3}', "{}", '{"_data_files": []}']
)
def test_a_damaged_saved_dataset(folder, state):
    datasets.Dataset.from_list(ROWS).save_to_disk("saved")
    (folder / "saved/state.json").write_text(state)
    with pytest.raises(DataError, match=r"^saved: cannot read this saved dataset: "):
        read("saved")


def test_a_saved_dataset_with_damaged_rows(folder):
    datasets.Dataset.from_list(ROWS).save_to_disk("saved")
    file = next(folder.glob("saved/*.arrow"))
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(DataError, match=r"^saved: cannot read this saved dataset: "):
        read("saved")

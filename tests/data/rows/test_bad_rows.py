"""What becomes of rows with a defect: an error with its place, or dropped, counted and listed."""

from __future__ import annotations

import json

import pytest

from qwen3_sft.commands.shown_samples import inspect
from qwen3_sft.data.prepare import prepare
from qwen3_sft.errors import DataError
from qwen3_sft.options.data_args import DataArguments
from tests.support.data_rows import ANSWER, BY_FORMAT, USER, chat

GOOD = chat(USER, ANSWER)
# One defect in each of the places where rows are read, named and rendered.
DEFECTS = {
    "not JSON": ('{"messages": [}', "broken JSON"),
    "not an object": ("3", "a row must be an object"),
    "no format": ({"persona": "p"}, "no known format"),
    "another format": ({"text": "t"}, "this row is 'text' but the file began as 'messages'"),
    "no answer": (chat(USER), "no assistant turn"),
    "unknown field": (chat(USER, ANSWER, persona="p"), "unknown meaning: persona"),
    "KTO": (chat(USER, ANSWER, label=False), "a judgement whether the answer is good"),
    "fraction": (chat(USER, {**ANSWER, "weight": 0.5}), "weight is 0.5"),
    "call": (chat(USER, {"role": "assistant", "content": "<tool_call>{"}), "without </tool_call>"),
    "question": (chat({"role": "user", "content": None}, ANSWER), "content must be a string"),
}


@pytest.fixture
def run(tmp_path, monkeypatch, tokenizer):
    monkeypatch.chdir(tmp_path)

    def prepared(rows, **options):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / "data.jsonl").write_text("\n".join(lines))
        args = {"dataset": ["data.jsonl"], "data_cache_dir": "cache", "num_proc": 1}
        return prepare(DataArguments(**{**args, **options}), tokenizer)

    return prepared


@pytest.mark.parametrize(("row", "words"), DEFECTS.values(), ids=DEFECTS)
def test_a_defect_stops_or_is_dropped_counted_and_listed(run, row, words):
    rows = [GOOD, row, GOOD]
    with pytest.raises(DataError, match=rf"^data.jsonl:2\b.*{words}"):
        run(rows)
    report = run(rows, on_bad_row="drop", max_drop_fraction=0.5).report
    kind = "a defect (--on_bad_row drop)"
    assert report["rows_dropped"] == {kind: {"count": 1, "first": "data.jsonl:2"}}
    (listed,) = report["dropped"]
    assert listed["location"] == "data.jsonl:2"
    assert words in listed["reason"]
    assert (report["rows_in"], report["rows_used"]) == (3, 2)
    with pytest.raises(DataError, match=f"1 of 3 rows .* were dropped.*the first: .*{words}"):
        run(rows, on_bad_row="drop")


def test_nothing_but_defects_is_an_error(run):
    row, words = DEFECTS["KTO"]
    with pytest.raises(DataError, match=f"all 2 rows have a defect.*the first: .*{words}"):
        run([row, row], on_bad_row="drop", max_drop_fraction=1.0)


def test_rows_after_a_dropped_first_one_have_its_files_format(run):
    rows = [DEFECTS["no format"][0], *[BY_FORMAT["alpaca"]] * 2]
    report = run(rows, on_bad_row="drop", max_drop_fraction=0.5).report
    assert report["formats"] == {"alpaca": 1}
    assert report["rows_used"] == 2


def test_workers_drop_and_list_the_same(run):
    rows = [DEFECTS[name][0] if i % 97 == 0 else GOOD
            for i, name in zip(range(600), list(DEFECTS) * 60, strict=True)]  # fmt: skip
    options = {"on_bad_row": "drop", "max_drop_fraction": 0.5}
    alone = run(rows, **options).report
    together = run(rows, **options, num_proc=2, data_cache_dir="other").report
    for name in ("dropped", "rows_dropped", "rows_in", "rows_used"):
        assert alone[name] == together[name]
    assert [row["location"] for row in alone["dropped"]] == [
        f"data.jsonl:{i + 1}" for i in range(0, 600, 97)
    ]


def test_rows_that_ask_for_no_label_are_no_defects(run):
    rows = [GOOD, *[{**GOOD, "weight": 0}] * 3]
    report = run(rows).report
    reason = "no label by its own loss flags"
    assert report["rows_dropped"] == {reason: {"count": 3, "first": "data.jsonl:2"}}
    with pytest.raises(DataError, match=f"all 3 rows have {reason}"):
        run(rows[1:])


def test_inspect_drops_what_training_drops(run, tokenizer):
    run([DEFECTS["KTO"][0], GOOD], on_bad_row="drop", max_drop_fraction=0.5)
    args = DataArguments(dataset=["data.jsonl"], on_bad_row="drop")
    (line,) = inspect(args, tokenizer, 5, "json")
    shown = json.loads(line)
    assert shown["location"] == "data.jsonl:2"
    assert shown["report"]["dropped"][0]["location"] == "data.jsonl:1"


def test_another_choice_is_another_cache(run):
    rows = [GOOD, chat(USER, {**ANSWER, "weight": 0}, USER, {"role": "assistant", "content": "b"})]
    honoured = run(rows).report
    ignored = run(rows, ignore_columns=["message.weight"]).report
    assert ignored["key"] != honoured["key"]
    assert ignored["label_tokens"] > honoured["label_tokens"]

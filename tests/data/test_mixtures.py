from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qwen3_sft.data.identity import data_fingerprint
from qwen3_sft.data.prepare import prepare
from qwen3_sft.data.report import report_text
from qwen3_sft.errors import DataError
from qwen3_sft.options.data_args import DataArguments
from tests.support.data_rows import sums
from tests.support.prepared import arrays


def write(name, rows):
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def mix(tmp_path, monkeypatch):
    """Three sources of other formats; returns the options that mix them."""
    monkeypatch.chdir(tmp_path)
    write("chat.jsonl", sums(9))
    write("qa.jsonl", [{"q": f"What is {i}?", "reply": "A number."} for i in range(6)])
    write("folder/train.jsonl", [{"text": f"Text {i}."} for i in range(4)])
    write("folder/other_train.jsonl", [{"text": f"More {i}."} for i in range(3)])
    write("folder/test.jsonl", [{"text": "Held out."}])
    entries = [
        "chat.jsonl",
        {"path": "qa.jsonl", "columns": {"question": "q", "answer": "reply"}, "max_rows": 5},
        {"path": "folder", "format": "text", "max_rows": 6},
    ]
    texts = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    return DataArguments(dataset=texts, data_cache_dir="cache", num_proc=1)


def counted(report):
    return {s["source"]: (s["rows_in"], s["rows_used"]) for s in report["sources"]}


@pytest.mark.parametrize("num_proc", [1, 2])
def test_each_source_is_read_as_its_entry_says(mix, tokenizer, num_proc):
    dataset = prepare(replace(mix, num_proc=num_proc), tokenizer)
    assert counted(dataset.report) == {"chat": (9, 9), "qa": (5, 5), "folder": (6, 6)}
    alone = [
        prepare(DataArguments(dataset=[text], data_cache_dir="cache", num_proc=1), tokenizer)
        for text in mix.dataset
    ]
    assert arrays(dataset) == [sample for one in alone for sample in arrays(one)]
    views = dataset.by_source()
    assert [arrays(view) for view in views.values()] == [arrays(one) for one in alone]
    for source, one in zip(dataset.report["sources"], alone, strict=True):
        for name in ("samples_used", "tokens_used", "label_tokens", "rows_used"):
            assert source[name] == one.report[name]


def test_max_rows_counts_over_all_sources_too(mix, tokenizer):
    report = prepare(replace(mix, max_rows=11), tokenizer).report
    assert counted(report) == {"chat": (9, 9), "qa": (2, 2), "folder": (0, 0)}
    assert prepare(replace(mix, max_rows=3), tokenizer).by_source().keys() == {"chat"}


def test_dropped_rows_and_empty_sources_leave_the_sources_apart(mix, tokenizer):
    write("empty.jsonl", [])
    write("qa.jsonl", [{"q": "x" * 9000, "reply": "Long."}, {"q": "Who?", "reply": "Me."}])
    mix.dataset.insert(1, "empty.jsonl")
    dataset = prepare(replace(mix, max_length=256, max_drop_fraction=1.0), tokenizer)
    found = counted(dataset.report)
    assert found == {"chat": (9, 9), "empty": (0, 0), "qa": (2, 1), "folder": (6, 6)}
    (question,) = arrays(dataset.by_source()["qa"])
    assert "Who?" in tokenizer.decode(question[0])


def test_repeats_change_no_token_but_what_a_run_is_told(mix, tokenizer):
    once = prepare(mix, tokenizer)
    twice = prepare(replace(mix, dataset=["chat.jsonl@2.5", *mix.dataset[1:]]), tokenizer)
    assert twice.folder == once.folder
    assert [source["repeat"] for source in twice.report["sources"]] == [2.5, 1.0, 1.0]
    assert twice.report["fingerprints"]["data"] != once.report["fingerprints"]["data"]
    labels = [source["label_tokens"] for source in once.report["sources"]]
    share = 2.5 * labels[0] / (2.5 * labels[0] + labels[1] + labels[2])
    assert f"labels, x 2.5 = {share:.1%} of an epoch's labels" in report_text(twice.report)


def test_a_run_keeps_the_hash_of_its_mixture(mix, tokenizer):
    for args in (mix, replace(mix, dataset=["chat.jsonl@2"])):
        fingerprint = prepare(args, tokenizer).report["fingerprints"]["data"]
        assert fingerprint == data_fingerprint(args)
    plain = replace(mix, dataset=["chat.jsonl"])
    said = json.dumps({"path": "chat.jsonl", "repeat": 1, "format": "auto"})
    assert data_fingerprint(plain) == data_fingerprint(replace(mix, dataset=[said]))
    fewer = json.dumps({"path": "chat.jsonl", "max_rows": 3})
    assert data_fingerprint(plain) != data_fingerprint(replace(mix, dataset=[fewer]))


def test_a_split_of_an_entry(mix, tokenizer):
    test = replace(mix, dataset=[json.dumps({"path": "folder", "split": "test"})])
    assert len(prepare(test, tokenizer)) == 1
    evaluation = replace(test, dataset=["chat.jsonl"], eval_dataset=test.dataset)
    assert len(prepare(evaluation, tokenizer, eval=True)) == 1


@pytest.mark.parametrize("key", ["split", "name"])
def test_what_a_file_has_not_is_refused(mix, tokenizer, key):
    args = replace(mix, dataset=[json.dumps({"path": "chat.jsonl", key: "test"})])
    with pytest.raises(DataError, match=f"chat.jsonl: a file has no {key} 'test'; leave {key} out"):
        prepare(args, tokenizer)

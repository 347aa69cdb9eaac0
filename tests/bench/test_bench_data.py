"""The script that measures the preparation of data: what it generates, and that it runs."""

from __future__ import annotations

import json
from importlib import import_module

import pytest

from tests.support.source_tree import ROOT


@pytest.fixture
def bench(monkeypatch):
    """Import a module of bench/ as its scripts do."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    return import_module


def test_it_measures_and_writes_what_it_says(bench, tokenizer, tmp_path, capsys):
    model, out = tmp_path / "model", tmp_path / "data.json"
    tokenizer.save_pretrained(model)
    command = ["--rows", "30", "--repeats", "1", "--model", str(model), "--out", str(out)]
    bench("data").main([*command, "--only", "ours_1", "ours_unsplit_1", "bare_1_thread"])
    report = json.loads(out.read_text())
    (ours,), (bare,) = report["results"]["ours_1"], report["results"]["bare_1_thread"]
    assert bare["samples"] == report["rows"] == 30
    assert ours["samples"] > 30  # rows of several turns are split
    assert ours["tokens"] > bare["tokens"] > 0
    (unsplit,) = report["results"]["ours_unsplit_1"]
    assert (unsplit["samples"], unsplit["tokens"]) == (bare["samples"], bare["tokens"])
    assert 0 < ours["again_seconds"] < ours["seconds"]
    assert report["medians"]["ours_1"]["cpu_seconds"] == ours["cpu_seconds"] > 0
    assert report["commit"]
    assert "| bare_1_thread |" in capsys.readouterr().out


def test_conversations_are_the_same_every_time(bench, tokenizer):
    module = bench("parts.data.conversations")
    words = module.frequent_words(tokenizer.get_vocab())
    first, again = ([*module.conversations(20, words)] for _ in range(2))
    assert first == again
    rounds = [len(row["messages"]) / 2 for row in first]
    assert min(rounds) >= 1
    assert max(rounds) < 2 * module.MEAN_ROUNDS
    assert len({message["content"] for row in first for message in row["messages"]}) > 100

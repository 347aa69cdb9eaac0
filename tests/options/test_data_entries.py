from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen3_sft.errors import UsageError
from qwen3_sft.options.command_line import read_options
from qwen3_sft.options.data_entries import DataEntry, read_entries, read_entry, source_names


def recipe(folder: Path, data: str) -> list[str]:
    path = folder / "recipe.yaml"
    path.write_text(f"model_name_or_path: m\noutput_dir: o\n{data}")
    return ["--config", str(path)]


def entries(argv, option="dataset"):
    return read_entries(read_options(argv).values[option], f"--{option}")


def test_a_recipe_may_say_everything_of_a_source(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    data = (
        "dataset:\n- plain.jsonl\n- {path: ~/b.jsonl, repeat: 2, max_rows: 7}\n"
        "- path: org/name\n  name: sub\n  split: test\n  format: question_answer\n"
        "  columns: {question: q}\n  repeat: 0.5\neval_dataset:\n- {path: e.jsonl, max_rows: 3}\n"
    )
    argv = recipe(tmp_path, data)
    assert entries(argv) == [
        DataEntry("plain.jsonl"),
        DataEntry("/home/me/b.jsonl", repeat=2.0, max_rows=7),
        DataEntry(
            "org/name", name="sub", split="test", format="question_answer",
            columns=("question=q",), repeat=0.5,
        ),
    ]  # fmt: skip
    assert entries(argv, "eval_dataset") == [DataEntry("e.jsonl", max_rows=3)]


def test_an_entry_reads_as_it_is_written():
    whole = DataEntry("a@2", "n", "s", "text", ("text=t",), 0.25, 3)
    for entry in (whole, DataEntry("a"), DataEntry("a", repeat=2.0), DataEntry("a@2")):
        assert read_entry(entry.text, "--dataset") == entry
    assert DataEntry("a").text == "a"


def test_repeats_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("real@3").touch()
    found = read_entries(["a.jsonl@2", "org/name:test@0.5", "real@3", "x@y"], "--dataset")
    assert [(entry.path, entry.repeat) for entry in found] == [
        ("a.jsonl", 2.0), ("org/name:test", 0.5), ("real@3", 1.0), ("x@y", 1.0),
    ]  # fmt: skip


WRONG = {
    "unknown key": ({"path": "a", "repeats": 2}, "unknown key 'repeats'; did you mean repeat"),
    "no path": ({"repeat": 2}, "an entry needs a path"),
    "empty path": ({"path": ""}, "path '' must be a word"),
    "no number": ({"path": "a", "repeat": "x"}, "a: repeat 'x' must be a number"),
    "a switch": ({"path": "a", "repeat": True}, "a: repeat True must be a number"),
    "zero": ({"path": "a", "repeat": 0}, "repeat 0 must be above 0"),
    "rows": ({"path": "a", "max_rows": 0}, "max_rows 0 must be a whole number above 0"),
    "half rows": ({"path": "a", "max_rows": 1.5}, "max_rows 1.5 must be a whole number"),
    "format": ({"path": "a", "format": "chat"}, "format 'chat' must be one of auto, messages"),
    "columns": ({"path": "a", "columns": "prompt"}, "columns 'prompt' must be a mapping"),
    "a list": ({"path": ["a"]}, "must be a word"),
}


@pytest.mark.parametrize(("said", "message"), WRONG.values(), ids=WRONG)
def test_wrong_entries_are_refused_with_their_line(tmp_path, said, message):
    argv = recipe(tmp_path, f"dataset:\n- {json.dumps(said)}\n")
    with pytest.raises(UsageError, match=r"recipe.yaml:3: --dataset") as raised:
        read_options(argv)
    assert message in str(raised.value)


@pytest.mark.parametrize("text", ["a@0", "a@-1", "a@nan", "a@inf"])
def test_wrong_repeats_are_refused(text):
    with pytest.raises(UsageError, match=f"--dataset {text}: repeat .* must be above 0"):
        read_entry(text, "--dataset")


def test_an_evaluation_is_not_repeated():
    with pytest.raises(UsageError, match="--eval_dataset a: repeat 2: an evaluation reads each"):
        read_entries(["a@2"], "--eval_dataset")


def test_other_lists_take_no_mappings(tmp_path):
    argv = recipe(tmp_path, "dataset: a\nreport_to:\n- {path: a}\n")
    with pytest.raises(UsageError, match="report_to: every entry of the list must be a word"):
        read_options(argv)


def test_names_of_sources_are_short_and_differ():
    def names(*paths):
        return source_names([DataEntry(path) for path in paths])

    assert names("/d/math.jsonl.gz", "org/chat:test", "code/") == ["math", "chat-test", "code"]
    assert names("a/train.jsonl", "b/train.jsonl") == ["a-train", "b-train"]
    assert names("a.jsonl", "a.jsonl") == ["a", "a-2"]
    two = [DataEntry("o/x", name="en"), DataEntry("o/x", name="de")]
    assert source_names(two) == ["x-en", "x-de"]

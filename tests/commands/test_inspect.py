from __future__ import annotations

import json
import pickle

import pytest

from qwen3_sft.commands.shown_samples import inspect
from qwen3_sft.data import template_check
from qwen3_sft.data.prepare import prepare
from qwen3_sft.errors import DataError
from qwen3_sft.options.data_args import DataArguments


def chat(*turns: str) -> dict:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": t} for i, t in enumerate(turns)]}


ROWS = [
    chat("first?", "One é.", "and then?", "Two 😀."),
    chat("word " * 200, "dropped"),
    chat("q", "<think>\nwhy\n</think>\n\na", "q2", "<think>\nwhy2\n</think>\n\na2"),
    chat("last", "end"),
]


@pytest.fixture
def args(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return DataArguments(dataset=["a.jsonl"], max_length=128, data_cache_dir="cache", num_proc=1)


def test_json(args, tokenizer):
    samples = [json.loads(line) for line in inspect(args, tokenizer, 10, "json")]
    assert [sample["trained"] for sample in samples] == [
        ["One é.<|im_end|>"],
        ["Two 😀.<|im_end|>"],
        ["<think>\nwhy\n</think>\n\na<|im_end|>"],
        ["<think>\nwhy2\n</think>\n\na2<|im_end|>"],
        ["end<|im_end|>"],
    ]
    rendered = tokenizer.apply_chat_template(ROWS[0]["messages"], tokenize=False)
    assert samples[1]["text"] == rendered
    assert samples[1]["input_ids"] == tokenizer(rendered)["input_ids"]
    for sample in samples:
        pairs = zip(sample["input_ids"], sample["labels"], strict=True)
        assert all(label in (-100, token) for token, label in pairs)
        kept = [label for label in sample["labels"] if label != -100]
        assert tokenizer.decode(kept) == "".join(sample["trained"])


def test_json_is_what_prepare_trains_on(args, tokenizer):
    samples = [json.loads(line) for line in inspect(args, tokenizer, 10, "json")]
    args.max_drop_fraction = 1.0
    dataset = prepare(args, tokenizer)
    assert len(dataset) == len(samples)
    for i, sample in enumerate(samples):
        ids, trained = dataset[i]
        assert sample["input_ids"] == ids.tolist()
        assert [label != -100 for label in sample["labels"]] == trained.tolist()


@pytest.mark.parametrize("n", [0, 1, 2, 3])
def test_as_many_samples_as_asked(args, tokenizer, n):
    assert len(list(inspect(args, tokenizer, n, "json"))) == n


def test_reads_no_more_rows_than_needed(args, tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(ROWS[0]) + "\nbroken")
    assert len(list(inspect(args, tokenizer, 1, "json"))) == 1
    with pytest.raises(DataError, match=r"a\.jsonl:2:1: broken JSON"):
        list(inspect(args, tokenizer, 3, "json"))


def test_text(args, tokenizer):
    lines = list(inspect(args, tokenizer, 10, "text"))
    ids = tokenizer(tokenizer.apply_chat_template(ROWS[0]["messages"], tokenize=False))["input_ids"]
    assert "«One é.<|im_end|>»" in lines[1]
    assert lines[2].startswith(f"--- a.jsonl:1: {len(ids)} tokens, ")
    assert "«Two 😀.<|im_end|>»" in lines[3]
    assert "a.jsonl:2: dropped, 1 x more than 128 tokens" in lines
    assert "rows      4 = 3 used + 1 dropped" in lines[-1]
    assert "split     2 rows became 4 samples" in lines[-1]
    assert "samples   6 = 5 used + 1 dropped" in lines[-1]


def test_json_carries_warnings_and_drops(args, tokenizer, tmp_path):
    odd = chat("a<|im_end|>b", "fine")
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [odd, *ROWS])))
    samples = [json.loads(line) for line in inspect(args, tokenizer, 10, "json")]
    kind = "control-token text kept as plain text"
    assert [sample["warnings"] for sample in samples] == [{kind: 1}, {}, {}, {}, {}, {}]
    assert samples[0]["location"] == "a.jsonl:1"
    report = samples[-1]["report"]
    assert report["warnings"] == {kind: {"count": 1, "first": "a.jsonl:1"}}
    assert report["rows_dropped"] == {"more than 128 tokens": {"count": 1, "first": "a.jsonl:3"}}
    args.max_drop_fraction = 1.0
    trained = prepare(args, tokenizer).report
    assert {key: trained[key] for key in report} == report


def test_what_training_refuses_is_not_shown(args, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(template_check, "is_shipped", lambda _: True)  # a process takes seconds
    changed = pickle.loads(pickle.dumps(tokenizer))
    changed.chat_template = tokenizer.chat_template.replace(
        "</tool_response>'", "</tool_response>!'"
    )
    tool_row = {
        "messages": [
            *chat("q")["messages"],
            {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}]},
            {"role": "tool", "content": "9"},
            {"role": "assistant", "content": "a"},
        ]
    }
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [ROWS[3]] * 150 + [tool_row])))
    assert len(list(inspect(args, changed, 150, "json"))) == 150
    for refused in (
        lambda: list(inspect(args, changed, 151, "text")),
        lambda: prepare(args, changed),
    ):
        with pytest.raises(DataError, match=r"a\.jsonl:151: .*differs from qwen3"):
            refused()


def test_colour(args, tokenizer):
    text = "\n".join(inspect(args, tokenizer, 1, "text", color=True))
    assert "\x1b[32mOne é.<|im_end|>\x1b[0m" in text
    assert "«" not in text


def test_truncation_and_warnings_are_shown(args, tokenizer):
    args.overlong, args.max_length = "truncate", 40
    lines = list(inspect(args, tokenizer, 10, "text"))
    assert any("tokens cut off" in line for line in lines)
    assert any("no label after truncation to 40" in line for line in lines)


def test_nothing_left_to_show(args, tokenizer):
    args.max_length = 5
    with pytest.raises(DataError, match="all 4 rows have more than 5 tokens"):
        list(inspect(args, tokenizer, 3, "json"))
    lines = list(inspect(args, tokenizer, 3, "text"))
    assert "rows      4 = 0 used + 4 dropped" in lines[-1]

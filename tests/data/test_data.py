from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch.distributed
from torch.utils.data import DataLoader

from qwen3_sft.data.prepare import prepare
from qwen3_sft.data.report import report_text
from qwen3_sft.errors import DataError
from qwen3_sft.options.data_args import DataArguments
from qwen3_sft.packing.collator import PackedCollator
from qwen3_sft.packing.rows import PackedDataset
from tests.support.prepared import arrays, write


def test_tokens_are_those_of_the_chat_template(args, rows, tokenizer):
    dataset = prepare(args, tokenizer)
    whole = [
        row for row in rows if len(row["messages"]) == 2 and "reasoning_content" not in str(row)
    ]
    expected = {tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in whole}
    found = {}
    for ids, trained in (dataset[i] for i in range(len(dataset))):
        assert ids.dtype == np.int32
        assert trained.dtype == bool
        found[tokenizer.decode(ids)] = tokenizer.decode(ids[trained])
    assert expected <= found.keys()
    for row in whole:
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        assert found[text] == row["messages"][1]["content"] + "<|im_end|>"


def test_report_adds_up(args, rows, tokenizer):
    args.max_length, args.max_drop_fraction = 100, 1.0
    dataset = prepare(args, tokenizer)
    report = dataset.report
    dropped = {
        what: sum(entry["count"] for entry in report[f"{what}_dropped"].values())
        for what in ("rows", "samples")
    }
    assert report["rows_in"] == len(rows) == report["rows_used"] + dropped["rows"]
    assert report["samples_used"] == len(dataset)
    assert report["samples_in"] == len(dataset) + dropped["samples"]
    assert report["samples_in"] > report["rows_in"]  # some conversations were split
    assert report["tokens_used"] == dataset.lengths.sum()
    whole = prepare(DataArguments(**{**vars(args), "max_length": 10_000}), tokenizer)
    assert (
        report["tokens_in"]
        == whole.lengths.sum()
        == report["tokens_used"] + report["tokens_dropped"]
    )
    labels = sum(dataset[i][1].sum() for i in range(len(dataset)))
    assert report["label_tokens"] == labels
    assert report["supervised_fraction"] == labels / dataset.lengths.sum()
    assert sum(report["length_histogram"].values()) == len(dataset)
    longest = np.sort(whole.lengths)[::-1][:10]
    assert [entry["tokens"] for entry in report["longest"]] == longest.tolist()
    assert report["length_quantiles"]["p50"] == np.sort(dataset.lengths)[(len(dataset) - 1) // 2]
    assert report["formats"] == {"messages": 1}
    assert json.loads(json.dumps(report)) == report
    assert f"{len(rows):,} = {report['rows_used']:,} used" in report_text(report)


def test_truncated_tokens_are_counted(args, tokenizer):
    whole = prepare(args, tokenizer)
    args.max_length, args.overlong, args.max_drop_fraction = 60, "truncate", 1.0
    report = prepare(args, tokenizer).report
    assert report["tokens_in"] == whole.lengths.sum()
    assert report["tokens_truncated"] > 0
    used, cut, lost = (report[f"tokens_{name}"] for name in ("used", "truncated", "dropped"))
    assert used + cut + lost == report["tokens_in"]


def test_histogram_uses_powers_of_two(tmp_path, tokenizer):
    data = tmp_path / "a.jsonl"
    lengths = [2, 3, 4, 5, 64, 65]
    data.write_text("\n".join(json.dumps({"input_ids": list(range(n))}) for n in lengths))
    args = DataArguments(dataset=[str(data)], data_cache_dir=str(tmp_path / "c"), num_proc=1)
    report = prepare(args, tokenizer).report
    assert report["length_histogram"] == {"<=2": 1, "<=4": 2, "<=8": 1, "<=64": 1, "<=128": 1}


def test_workers_give_the_same_arrays_and_report(args, tokenizer):
    alone = prepare(args, tokenizer)
    args.num_proc, args.data_cache_dir = 2, "cache2"
    together = prepare(args, tokenizer)
    for name in ("ids", "trained", "offsets", "rows"):
        files = [d.folder / f"{name}.npy" for d in (alone, together)]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert {**alone.report, "seconds": 0} == {**together.report, "seconds": 0}


def test_error_of_a_worker_is_the_error_itself(args, rows, tokenizer):
    write([*rows[:600], {"messages": []}, *rows[600:], {"messages": "later"}])
    args.num_proc = 2
    with pytest.raises(DataError, match=r"^data.jsonl:601: empty conversation"):
        prepare(args, tokenizer)
    assert not list(Path("cache").glob("*.partial-*"))


@pytest.mark.parametrize("num_proc", [0, -1])
def test_num_proc_below_one(args, tokenizer, num_proc):
    args.num_proc = num_proc
    with pytest.raises(ValueError, match=f"num_proc is {num_proc}; set it to 1"):
        prepare(args, tokenizer)


def test_refuses_to_run_inside_a_process_group(args, tokenizer, tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError, match="call it before TrainingArguments"):
            prepare(args, tokenizer)
    finally:
        torch.distributed.destroy_process_group()


def test_customised_template_is_found(args, tokenizer, caplog):
    changed = pickle.loads(pickle.dumps(tokenizer))
    changed.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|im_end|> ")
    with pytest.raises(DataError, match="template differs from qwen3 at character"):
        prepare(args, changed)
    args.chat_format = "qwen3"
    assert len(prepare(args, changed))
    assert (
        "training on qwen3 as told, but data.jsonl:1: the tokenizer's chat template" in caplog.text
    )


def test_tokenizer_without_a_template(args, tokenizer):
    bare = pickle.loads(pickle.dumps(tokenizer))
    bare.chat_template = None
    with pytest.raises(DataError, match=r"data.jsonl:1: cannot render it: .*set --chat_format"):
        prepare(args, bare)
    write([{"text": "only plain text"}])
    ids, trained = prepare(args, bare)[0]
    assert tokenizer.decode(ids) == "only plain text<|im_end|>"
    assert trained.tolist() == [False] + [True] * (len(ids) - 1)


def test_eval_data(args, rows, tokenizer):
    Path("eval.jsonl").write_text(json.dumps(rows[5]))
    args.eval_dataset = ["eval.jsonl"]
    assert prepare(args, tokenizer, eval=True).report["files"] == ["eval.jsonl"]


def test_one_format_per_file_but_several_per_run(args, rows, tokenizer):
    Path("text.jsonl").write_text(json.dumps({"text": "some words"}))
    Path("empty.jsonl").touch()
    args.dataset += ["text.jsonl", "empty.jsonl"]
    report = prepare(args, tokenizer).report
    assert report["formats"] == {"messages": 1, "text": 1}
    assert report["warnings"]["source without rows"] == {"count": 1, "first": "empty.jsonl"}


def test_pickle_carries_no_tokens(args, tokenizer):
    dataset = prepare(args, tokenizer)
    data = pickle.dumps(dataset)
    assert len(data) < 500
    assert arrays(pickle.loads(data)) == arrays(dataset)


def test_loader_with_workers_gives_the_same_batches(args, tokenizer):
    rows = PackedDataset(prepare(args, tokenizer), 1024, seed=1, rows_multiple_of=4)
    rows.set_epoch(3)
    collate = PackedCollator(1024, tokenizer.pad_token_id)
    loaders = [
        DataLoader(
            rows, batch_size=2, collate_fn=collate, num_workers=n, multiprocessing_context=context
        )
        for n, context in ((0, None), (1, "spawn"))
    ]
    batches = list(zip(*loaders, strict=True))
    assert len(batches) == len(rows) // 2
    for here, there in batches:
        assert here["stats"] == there["stats"]
        for name, value in here.items():
            if name != "stats":
                assert np.array_equal(value, there[name]), name
    assert sum(here["stats"].tokens for here, _ in batches) == rows.tokens.lengths.sum()
    assert (
        sum(here["stats"].label_tokens for here, _ in batches) == rows.tokens.report["label_tokens"]
    )


def test_split_keeps_rows_whole_and_repeats(args, tokenizer):
    dataset = prepare(args, tokenizer)
    train, held_out = dataset.split(0.1, seed=1)
    assert len(train) + len(held_out) == len(dataset)
    assert not set(train._rows) & set(held_out._rows)
    assert len(set(held_out._rows)) == 70
    assert sorted(arrays(train) + arrays(held_out)) == sorted(arrays(dataset))
    again = dataset.split(0.1, seed=1)[1]
    assert arrays(again) == arrays(held_out) != arrays(dataset.split(0.1, seed=2)[1])
    assert arrays(pickle.loads(pickle.dumps(held_out))) == arrays(held_out)
    nested = held_out.split(0.5, seed=0)
    assert sorted(arrays(nested[0]) + arrays(nested[1])) == sorted(arrays(held_out))


def test_split_is_never_empty(args, rows, tokenizer):
    args.max_rows = 3
    dataset = prepare(args, tokenizer)
    with pytest.raises(DataError, match=r"eval_fraction 0\.1 of 3 rows leaves 0"):
        dataset.split(0.1, seed=0)
    for fraction in (0, 0.6, -1):
        with pytest.raises(ValueError, match=r"above 0 and up to 0\.5"):
            dataset.split(fraction, seed=0)


def test_report_says_what_splitting_costs(args, tokenizer):
    turns = [{"role": role, "content": "some words"} for role in ("user", "assistant")]
    write([{"messages": turns}, {"messages": turns * 3}])
    dataset = prepare(args, tokenizer)
    lengths = [len(dataset[i][0]) for i in range(len(dataset))]
    report = dataset.report
    assert (report["rows_in"], report["rows_split"], report["samples_of_split_rows"]) == (2, 1, 3)
    assert report["tokens_repeated"] == lengths[1] + lengths[2]
    once = lengths[0] + lengths[3]
    text = report_text(report)
    assert (
        "split     1 rows became 3 samples, since inference shows their answers different" in text
    )
    cost = f"{sum(lengths)} tokens in place of {once}, x {sum(lengths) / once:.2f}"
    assert cost in text
    args.chat_format = "qwen3_thinking_2507"
    kind = "answer without reasoning: </think> is learned as the first thing to say"
    assert prepare(args, tokenizer).report["warnings"][kind] == {
        "count": 4,
        "first": "data.jsonl:1",
    }

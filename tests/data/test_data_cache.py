from __future__ import annotations

import json
import logging
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from qwen3_sft.data import cache_key
from qwen3_sft.data.prepare import prepare
from qwen3_sft.errors import DataError
from qwen3_sft.options.data_args import DataArguments
from tests.support.prepared import NUM_ROWS, arrays


def test_second_call_reads_the_cache(args, tokenizer, monkeypatch):
    first = prepare(args, tokenizer)
    monkeypatch.setattr(
        "qwen3_sft.data.prepare._tokenize", lambda *_: pytest.fail("tokenised again")
    )
    second = prepare(args, tokenizer)
    assert second.folder == first.folder
    assert arrays(second) == arrays(first)


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 512},
        {"overlong": "error"},
        {"train_on": "all"},
        {"thinking": "keep"},
        {"train_empty_think": True},
        {"max_rows": 5},
    ],
)
def test_options_that_decide_the_tokens_change_the_cache(args, tokenizer, change):
    first = prepare(args, tokenizer)
    other = prepare(DataArguments(**{**vars(args), **change}), tokenizer)
    assert other.folder != first.folder


def test_other_options_share_the_cache(args, tokenizer):
    first = prepare(args, tokenizer)
    other = {"packing": False, "num_proc": 2, "max_drop_fraction": 0.5, "eval_fraction": 0.1}
    assert prepare(DataArguments(**{**vars(args), **other}), tokenizer).folder == first.folder


def test_content_decides_and_not_time(args, rows, tokenizer):
    first = prepare(args, tokenizer)
    os.utime("data.jsonl", (1, 1))
    assert prepare(args, tokenizer).folder == first.folder
    # The same size, a little later: the hash must not be taken from memory.
    data = Path("data.jsonl").read_text()
    Path("data.jsonl").write_text(data.replace("What", "Whar", 1))
    changed = prepare(args, tokenizer)
    assert changed.folder != first.folder
    assert tokenizer.decode(changed[0][0]) != tokenizer.decode(first[0][0])


def test_hashes_of_settled_files_are_remembered(tmp_path):
    data, memo = tmp_path / "data", tmp_path / "memo.json"
    data.write_text("one")
    hashes = cache_key.FileHashes(memo)
    hashes(data)
    hashes.save()
    assert not memo.exists()  # just written: it may change again at the same time stamp
    os.utime(data, (1, 1))
    digest = hashes(data)
    hashes.save()
    known = json.loads(memo.read_text())
    assert list(known.values()) == [digest]
    memo.write_text(json.dumps(dict.fromkeys(known, "remembered")))
    assert cache_key.FileHashes(memo)(data) == "remembered"
    memo.write_text("{broken")
    assert cache_key.FileHashes(memo)(data) == digest


def test_key_covers_all_code_that_makes_tokens():
    code = (
        "import sys, qwen3_sft.data.tokenize_rows;"
        "print(*(m for m in sys.modules if m.startswith(('qwen3_sft.', 'torch', 'transformers'))))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    folders = {"qwen3_sft.chat", "qwen3_sft.data", "qwen3_sft.data.files", "qwen3_sft.data.rows"}
    said = {f"qwen3_sft.options{name}" for name in ("", ".data_entries", ".listing")}
    packages = {*folders, *said, "qwen3_sft.errors"}  # no token comes of them
    imported = set(run.stdout.split()) - packages
    assert sorted(module.__name__ for module in cache_key.TOKENISERS) == sorted(imported)


@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_damaged_cache_is_made_anew(args, tokenizer, damage, caplog):
    dataset = prepare(args, tokenizer)
    expected = arrays(dataset)
    ids = dataset.folder / "ids.npy"
    if damage == "cut":
        os.truncate(ids, ids.stat().st_size - 4)
    else:
        ids.unlink()
    assert arrays(prepare(args, tokenizer)) == expected
    assert "is damaged" in caplog.text


def test_a_foreign_file_of_hashes_is_not_overwritten(args, tokenizer):
    memo = Path(args.data_cache_dir) / "file_hashes.json"
    memo.parent.mkdir(exist_ok=True)
    os.utime("data.jsonl", (1, 1))
    for text in ("mine", "[1]", '{"mine": 1}'):
        memo.write_text(text)
        prepare(args, tokenizer)
        assert memo.read_text() == text
    memo.unlink()
    prepare(args, tokenizer)
    assert str(Path("data.jsonl").resolve()) in memo.read_text()


def test_dropped_share_is_checked_for_a_cached_set_too(args, rows, tokenizer):
    args.max_length = 100
    for _ in range(2):
        with pytest.raises(DataError, match=r"more than max_drop_fraction 1\.00%"):
            prepare(args, tokenizer)
    args.max_drop_fraction = 1.0
    assert len(prepare(args, tokenizer))


def _prepare_and_log(args, tokenizer, log: Path) -> None:
    logging.basicConfig(filename=log, level=logging.INFO)
    prepare(args, tokenizer)


def test_another_process_waits_for_the_first_and_says_so(args, tokenizer):
    folder = prepare(args, tokenizer).folder
    os.rename(folder, "hidden")
    log = Path("log")
    process = multiprocessing.get_context("spawn").Process(
        target=_prepare_and_log, args=(args, tokenizer, log)
    )
    with FileLock(Path("cache", f"{folder.name}.lock")):
        process.start()
        deadline = time.monotonic() + 60
        while not log.exists() or "another process prepares the data" not in log.read_text():
            assert process.is_alive(), "it did not wait"
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.rename("hidden", folder)  # the holder of the lock publishes its cache
        made = folder.stat().st_ino
    process.join(timeout=60)
    assert process.exitcode == 0
    assert f"{NUM_ROWS} = {NUM_ROWS} used" in log.read_text()
    assert folder.stat().st_ino == made  # it was read, not made again

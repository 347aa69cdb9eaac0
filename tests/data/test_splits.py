"""What of a folder is read: the split asked for, by the hub's rules; the rest is left and named."""

from __future__ import annotations

import json
import logging
from pathlib import Path, PurePath

import datasets
import pytest
from datasets.data_files import DataFilesDict, get_data_patterns

from qwen3_sft.data.files import folders
from qwen3_sft.data.files.splits import splits_of
from qwen3_sft.data.readers import find_sources
from qwen3_sft.errors import DataError
from qwen3_sft.options.data_args import DataArguments


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Make files in the folder `d` of the working folder; each row names its file."""
    monkeypatch.chdir(tmp_path)
    folders._say.cache_clear()

    def make(*names: str) -> None:
        for name in names:
            path = Path("d", name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"text": name}) + "\n", encoding="utf-8")

    return make


def read(name: str = "d", **options) -> list[str]:
    """Return the files that training reads, relative to the folder."""
    sources = find_sources(DataArguments(dataset=[name], **options))
    return [str(Path(source.name).relative_to("d")) for source in sources]


def read_eval(name: str = "d") -> list[str]:
    args = DataArguments(dataset=["unused"], eval_dataset=[name])
    return [str(Path(source.name).relative_to("d")) for source in find_sources(args, eval=True)]


HUB_LAYOUTS = {
    "files": ["train.jsonl", "test.jsonl"],
    "every word": [f"{word}.jsonl" for word in ("training", "dev", "val", "valid", "validation",
        "eval", "evaluation", "test", "testing", "train")],
    "numbered": ["train_0.jsonl", "train_1.jsonl", "test_0.jsonl", "test1.json"],
    "delimited": ["my-train.jsonl", "my dev v2.jsonl", "my.test.jsonl"],
    "no delimiter": ["trainset.jsonl", "testset.jsonl", "contest.jsonl", "retrain.jsonl"],
    "no delimiter beside one": ["train.jsonl", "testset.jsonl", "latest.jsonl"],
    "folders": ["train/a.jsonl", "train/sub/b.jsonl", "test/a.jsonl", "val/c.json"],
    "delimited folders": ["data/sft_train_v2/a.jsonl", "data/sft_test/b.jsonl"],
    "folders before files": ["train/a.jsonl", "test.jsonl", "b.jsonl"],
    "shards": ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet",
        "data/test_sft-00000-of-00001-abc.parquet", "data/extra.parquet"],
    "shards elsewhere": ["main/train-00000-of-00001.parquet", "main/test-00000-of-00001.parquet"],
    "no names": ["a.jsonl", "sub/b.jsonl"],
    "one split": ["test.jsonl", "a.jsonl"],
}  # fmt: skip


@pytest.mark.parametrize("files", HUB_LAYOUTS.values(), ids=HUB_LAYOUTS)
def test_splits_are_those_that_datasets_finds(make, files):
    make(*files)
    base = str(Path("d").absolute())
    by_hub = DataFilesDict.from_patterns(get_data_patterns(base), base).items()
    expected = {str(split): sorted(set(found)) for split, found in by_hub}
    found = splits_of([PurePath(name) for name in files], Path("d")).files
    assert {s: sorted(f"{base}/{file}" for file in names) for s, names in found.items()} == expected


STRICTER = {  # where `datasets` would train what is named for a test
    "upper case": (["Train.jsonl", "TEST.jsonl"], ["Train.jsonl"]),
    "test in a train folder": (["training_data/train.jsonl", "training_data/test.jsonl"],
        ["training_data/train.jsonl"]),
    "train in a test folder": (["train/a.jsonl", "test/train.jsonl"], ["train/a.jsonl"]),
    "a folder of both": (["train_test_split/train.jsonl", "train_test_split/test.jsonl"],
        ["train_test_split/train.jsonl"]),
    "a pair in a train folder": (["train/train_test_pairs.jsonl"],
        ["train/train_test_pairs.jsonl"]),
}  # fmt: skip


@pytest.mark.parametrize(("files", "trained"), STRICTER.values(), ids=STRICTER)
def test_what_is_named_for_a_test_is_not_trained(make, files, trained):
    make(*files)
    assert read() == trained


@pytest.mark.parametrize("name", ["train_test.jsonl", "train/test/a.jsonl"])
def test_a_name_of_two_splits_is_refused(make, name):
    make(name)
    with pytest.raises(DataError, match=f"^d/{name}: its name tells the splits test and train"):
        read()


def test_the_split_asked_for_is_read(make):
    make("train.jsonl", "dev.jsonl", "test.jsonl", "eval.jsonl")
    assert read() == read(dataset_split="training") == read("d:train") == ["train.jsonl"]
    assert read("d:test") == read(dataset_split="test") == ["eval.jsonl", "test.jsonl"]
    for word in ("dev", "val", "validation"):
        assert read(f"d:{word}") == ["dev.jsonl"]
    with pytest.raises(DataError, match=r"^d: no split 'heldout'; it has test, train, validation"):
        read("d:heldout")


def test_a_folder_without_train_is_not_trained(make):
    make("test.jsonl", "a.jsonl")
    message = r"no split 'train'; it has test, and without a split a\.jsonl: set --dataset_split"
    with pytest.raises(DataError, match=message):
        read()
    Path("d/test.jsonl").unlink()
    assert read() == ["a.jsonl"]
    with pytest.raises(DataError, match=r"no split 'test'; it has train: .*\(d:train\)"):
        read(dataset_split="test")


def test_evaluation_takes_validation_else_test(make, caplog):
    make("train.jsonl", "test.jsonl", "val.jsonl")
    caplog.set_level(logging.INFO, "qwen3_sft")
    assert read_eval() == ["val.jsonl"]
    assert "d: the split validation is read (val.jsonl); left: " in caplog.text
    Path("d/val.jsonl").unlink()
    assert read_eval() == ["test.jsonl"]
    Path("d/test.jsonl").unlink()
    with pytest.raises(DataError, match=r"no validation .*it has train: .*--eval_dataset d:train"):
        read_eval()
    assert read_eval("d:train") == ["train.jsonl"]
    Path("d/train.jsonl").rename("d/heldout.jsonl")
    assert read_eval() == ["heldout.jsonl"]


def test_evaluation_on_the_hub_names_its_split():
    with pytest.raises(DataError, match=r"org/name: which split .*--eval_dataset org/name:valid"):
        read_eval("org/name")
    args = DataArguments(eval_dataset=["org/name:test"])
    assert [source.name for source in find_sources(args, eval=True)] == ["org/name:test"]


def test_saved_datasets_follow_the_same_rules(make):
    row = datasets.Dataset.from_list([{"text": "x"}])
    datasets.DatasetDict(train=row, dev=row, test_sft=row).save_to_disk("d")
    assert read() == ["train"]
    assert read("d:validation") == read_eval() == ["dev"]
    with pytest.raises(DataError, match="no split 'test'; it has dev, test_sft, train"):
        read("d:test")
    datasets.Dataset.from_list([{"text": "x"}], split="test").save_to_disk("d/one")
    with pytest.raises(DataError, match="one: no split 'train'; it has test: set --dataset_split"):
        read("d/one")
    assert read("d/one:test") == read_eval("d/one") == ["one"]


def test_other_files_beside_data_are_left_and_named(make, caplog):
    make("a.jsonl", "b.json")
    make("load.py", "test.py", "README.md", "LICENSE", "pic.PNG", "eval.ipynb", "dataset_info.json")
    make(".DS_Store", ".git/train.jsonl", "__pycache__/load.pyc", "sub/.x.jsonl", "notes.txt")
    caplog.set_level(logging.INFO, "qwen3_sft")
    assert read() == read() == ["a.jsonl", "b.json"]
    (line,) = caplog.messages
    assert line == (
        "d: all data is read (a.jsonl, b.json); left: no data (LICENSE, README.md, "
        "dataset_info.json and 5 more), hidden (.git, __pycache__, .DS_Store and 1 more)"
    )


def test_all_that_is_read_needs_no_line(make, caplog):
    make("a.jsonl")
    caplog.set_level(logging.INFO, "qwen3_sft")
    assert read() == ["a.jsonl"]
    assert not caplog.messages


@pytest.mark.parametrize("name", ["b.zip", "b.xlsx", "sub/b.PKL", "b.jsonl.lz4"])
def test_what_may_hold_rows_is_never_left_out(make, name):
    make("a.jsonl", name)
    with pytest.raises(DataError, match=f"^d/{name}: unknown kind of file"):
        read()
    make("train.jsonl")
    assert read() == ["train.jsonl"]  # it is of no split then, as a.jsonl is


def test_a_folder_with_glob_characters_in_its_name(make):
    make("[x]/train.jsonl", "[x]/test.jsonl")
    assert read("d/[x]") == ["[x]/train.jsonl"]


CARD = """---
license: mit
configs:
- config_name: main
  default: true
  data_files:
  - {split: train, path: main/*.jsonl}
  - {split: heldout, path: [extra/test.jsonl, "extra/**/more-*"]}
- config_name: other
  data_dir: other
---
# Rows
"""


def test_a_card_declares_splits(make):
    make("main/test.jsonl", "extra/test.jsonl", "extra/a/b/more-1.jsonl", "stray.jsonl")
    make("other/train.jsonl", "other/test.jsonl")
    Path("d/README.md").write_text(CARD)
    assert read() == ["main/test.jsonl"]
    assert read("d:heldout") == ["extra/a/b/more-1.jsonl", "extra/test.jsonl"]
    assert read(dataset_config="other") == ["other/train.jsonl"]
    with pytest.raises(DataError, match=r"no split 'test'; it has heldout, train, and without "):
        read("d:test")
    with pytest.raises(DataError, match=r"no configuration 'x' in its README.md, .*main, other"):
        read(dataset_config="x")
    by_hub = datasets.load_dataset("d", "main", cache_dir="cache")
    assert {str(split): sorted(rows["text"]) for split, rows in by_hub.items()} == {
        split: read(f"d:{split}") for split in ("train", "heldout")
    }


BROKEN_CARDS = {
    "several": (CARD.replace("default: true", "x: 1"), r"^d: several configurations in its READ"),
    "no file": (CARD.replace("jsonl", "csv").replace("more", "x"), r"^d: no file is of the data_"),
    "no YAML": ("---\nconfigs: [a: b: c\n---\n", r"^d/README.md: cannot read the header"),
    "no names": ("---\nconfigs: [a]\n---\n", r"^d/README.md: cannot read the header"),
}  # fmt: skip


@pytest.mark.parametrize(("card", "message"), BROKEN_CARDS.values(), ids=BROKEN_CARDS)
def test_a_card_that_tells_no_split(make, card, message):
    make("main/a.jsonl")
    Path("d/README.md").write_text(card)
    with pytest.raises(DataError, match=message):
        read()


@pytest.mark.parametrize("card", ["", "# Data\n---\n", "---\nlicense: mit\n---\n", "---\n"])
def test_a_readme_without_splits_changes_nothing(make, card):
    make("train.jsonl", "test.jsonl")
    Path("d/README.md").write_text(card)
    assert read() == ["train.jsonl"]


def test_linked_folders_are_read_once(make):
    make("a.jsonl", "../elsewhere/b.jsonl")
    Path("d/more").symlink_to("../elsewhere")
    Path("d/again").symlink_to("../elsewhere")
    Path("d/loop").symlink_to(".")
    found = find_sources(DataArguments(dataset=["d"]))
    assert sorted(Path(source.name).name for source in found) == ["a.jsonl", "b.jsonl"]


@pytest.mark.parametrize(
    "options",
    [
        {"dataset_split": "validation"},
        {"dataset_config": "en"},
        {"dataset_revision": "main"},
        {"streaming": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_an_option_that_no_source_has_a_use_for_is_refused(make, options):
    make("a.jsonl", "validation/b.jsonl")
    (name,) = options
    with pytest.raises(DataError, match=rf"^--{name} .*: only a .* leave it out"):
        find_sources(DataArguments(dataset=["d/a.jsonl"], **options))
    find_sources(DataArguments(dataset=["d/a.jsonl", "org/name"], **options))


@pytest.mark.parametrize("name", ["https://x.y/a.jsonl", "s3://x/a.jsonl", "hf://datasets/a/b"])
def test_an_address_is_told_at_once(name):
    with pytest.raises(DataError, match=r": an address is not read; download"):
        find_sources(DataArguments(dataset=[name]))


def test_a_row_of_another_split_is_refused_in_training_alone(make):
    make("a.jsonl")
    Path("d/a.jsonl").write_text('{"text": "t", "split": "test"}\n', encoding="utf-8")
    args = DataArguments(dataset=["d/a.jsonl"], eval_dataset=["d/a.jsonl"])
    assert [source.split for source in find_sources(args)] == ["train"]
    assert [source.split for source in find_sources(args, eval=True)] == [None]

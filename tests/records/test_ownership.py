"""What a run or an export may replace, and by which signs: nothing of the user's goes."""

import json
import os

import pytest

from qwen3_sft.checkpoints.manifest import seal
from qwen3_sft.cli import main
from qwen3_sft.errors import UsageError
from qwen3_sft.options.recipe import parse_options
from qwen3_sft.records.overlap import refuse_export_over_source, refuse_run_over_source
from qwen3_sft.records.ownership import (
    EXPORT_MARK,
    is_export,
    mark_export,
    mark_run,
    refuse_foreign_export,
    refuse_foreign_run,
)
from qwen3_sft.run import run_command

RECORDS = (
    "config.yaml", "metrics.jsonl", "environment.json", "data_report.json", "samples.jsonl",
    "summary.json", "INTERRUPTED", "plan_check.json", "eval_data_report.json",
)  # fmt: skip


def fill(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    return folder


def content(folder):
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---- what an export replaces ----


@pytest.mark.parametrize("state", ["absent", "empty", "ours"])
def test_an_export_may_replace_what_is_empty_or_ours(tmp_path, state):
    folder = tmp_path / "model"
    if state != "absent":
        folder.mkdir()
    if state == "ours":
        mark_export(fill(folder, "config.json", "model.safetensors"), tmp_path, "bfloat16")
        assert is_export(folder)
    refuse_foreign_export(folder)


@pytest.mark.parametrize("names", [["thesis.tex"], ["config.json", "model.safetensors"], ["a/b"]])
@pytest.mark.parametrize("marked", [False, True])
def test_an_export_replaces_nothing_else(tmp_path, names, marked):
    folder = tmp_path / "model"
    if marked:
        mark_export(fill(folder, "tokenizer.json"), tmp_path, "bfloat16")
    fill(folder, *names)
    with pytest.raises(UsageError, match=r"thesis\.tex|config\.json|holds a, not"):
        refuse_foreign_export(folder)
    assert not is_export(folder)


def test_a_broken_or_foreign_mark_is_none(tmp_path):
    for text in ("", "[]", '{"files": 3}', "{}"):
        fill(tmp_path, "mine")
        (tmp_path / EXPORT_MARK).write_text(text)
        with pytest.raises(UsageError, match="mine"):
            refuse_foreign_export(tmp_path)


def test_a_mark_names_no_folder_of_this_machine(tmp_path):
    mark_export(fill(tmp_path / "new", "config.json"), tmp_path / "run" / "checkpoint-4", "float16")
    mark = json.loads((tmp_path / "new" / EXPORT_MARK).read_text())
    assert mark["source"] == "run/checkpoint-4"
    assert mark["dtype"] == "float16"
    assert mark["files"] == ["config.json"]
    assert {"torch", "transformers"} <= mark["versions"].keys()


@pytest.mark.parametrize(
    "target", [".", "..", "../..", "below", "../checkpoint-4", "../link", "../link/below"]
)
def test_an_export_never_touches_what_it_reads(tmp_path, target, monkeypatch, capsys):
    checkpoint = fill(tmp_path / "run" / "checkpoint-4", "config.json")
    seal(checkpoint, {}, step=4)
    (tmp_path / "run" / "link").symlink_to(checkpoint)
    before = content(tmp_path)
    monkeypatch.chdir(checkpoint)
    for source, folder in ((checkpoint, checkpoint / target), (".", target)):
        assert main(["export", str(source), str(folder)]) == 2
        assert "which it reads" in capsys.readouterr().err
    assert content(tmp_path) == before
    refuse_export_over_source(checkpoint, tmp_path / "run" / "model")


def test_a_foreign_folder_is_refused_before_the_checkpoint_is_looked_at(tmp_path, capsys):
    folder = fill(tmp_path / "papers", "thesis.tex")
    (tmp_path / "link").symlink_to(folder)
    for name in ("papers", "link"):
        assert main(["export", str(tmp_path / "no_checkpoint"), str(tmp_path / name)]) == 2
        assert f"{tmp_path / name} holds thesis.tex" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "papers"]


# ---- what a run overwrites ----


@pytest.mark.parametrize("name", [*RECORDS, ".saving", ".removed-checkpoint-3", ".summary.json"])
def test_a_foreign_record_is_not_overwritten(tmp_path, name):
    if name == ".summary.json":
        name += ".partial"
    fill(tmp_path / "run", name, "notes.txt")
    with pytest.raises(UsageError, match=rf"{name}, which a run would overwrite"):
        refuse_foreign_run(tmp_path / "run")
    mark_run(tmp_path / "run")
    refuse_foreign_run(tmp_path / "run")


def test_a_folder_with_other_files_is_fine(tmp_path):
    refuse_foreign_run(tmp_path / "new")
    fill(tmp_path, "notes.txt", "data.jsonl", "checkpoint-1/mine", "config.yml", "base/x")
    refuse_foreign_run(tmp_path)


@pytest.mark.parametrize("sign", ["environment", "checkpoint"])
def test_folders_of_earlier_versions_are_ours(tmp_path, sign):
    fill(tmp_path, "config.yaml", "metrics.jsonl")
    if sign == "environment":
        record = {"versions": {}, "device": {}, "engine": {}, "world_size": 1}
        (tmp_path / "environment.json").write_text(json.dumps(record))
    else:
        (tmp_path / "checkpoint-3").mkdir()
        seal(tmp_path / "checkpoint-3", {}, step=3, layout="whole")
    refuse_foreign_run(tmp_path)


def test_the_run_that_is_refused_leaves_all_as_it_was(tmp_path, caplog):
    out, base = fill(tmp_path / "out", "config.yaml", "notes.txt"), fill(tmp_path / "base", "x")
    before = content(tmp_path)
    words = ["--model_name_or_path", str(base), "--dataset", "nowhere.jsonl"]
    assert run_command([*words, "--output_dir", str(out)]) == 2
    assert "config.yaml, which a run would overwrite" in caplog.text
    assert content(tmp_path) == before


def test_a_foreign_model_folder_is_refused_before_data_is_read(tmp_path, caplog):
    out, base = fill(tmp_path / "out", "model/weights"), fill(tmp_path / "base", "x")
    words = ["--model_name_or_path", str(base), "--dataset", "nowhere.jsonl"]
    assert run_command([*words, "--output_dir", str(out)]) == 2
    assert f"{out}/model holds weights" in caplog.text
    assert [p.name for p in out.iterdir()] == ["model"]


@pytest.mark.parametrize("dry", [(), ("--dry_run", "true")])
@pytest.mark.parametrize("mine", ["base/notes.txt", "base"])
def test_a_demo_is_built_in_no_folder_of_the_users(tmp_path, caplog, mine, dry):
    out = fill(tmp_path / "out", mine)
    words = ["--model_name_or_path", "demo", "--dataset", "demo", "--output_dir", str(out)]
    assert run_command([*words, *dry]) == 2
    assert f"{out}/base" in caplog.text
    assert content(tmp_path) == {str(out / mine): b"mine"}


# ---- what a run reads ----


def options(folder, **changed):
    words = {"model_name_or_path": folder / "base", "dataset": folder / "d.jsonl"}
    words |= {"output_dir": folder / "out"} | changed
    return parse_options([part for k, v in words.items() for part in (f"--{k}", str(v))])


READS = [
    ("model_name_or_path", "out/model"), ("model_name_or_path", "out/checkpoint-4"),
    ("model_name_or_path", "out/../out/model"), ("model_name_or_path", "link"),
    ("model_name_or_path", "linked"), ("model_name_or_path", "."), ("model_name_or_path", "out"),
    ("dataset", "out/model/d.jsonl"), ("dataset", "out/model/sub"), ("dataset", "out/model/sub:x"),
    ("dataset", "out/metrics.jsonl"), ("dataset", "linked"), ("dataset", "."),
    ("eval_dataset", "out/checkpoint-4/d.jsonl"), ("eval_dataset", "out/samples.jsonl"),
    ("data_cache_dir", "out/model/cache"), ("config", "out/model/r.yaml"),
    ("config", "out/config.yaml"), ("resume", "out/model"),
]  # fmt: skip


@pytest.mark.parametrize(("option", "name"), READS)
def test_a_run_never_writes_where_it_reads(tmp_path, option, name):
    fill(tmp_path / "out", "model/d.jsonl", "model/sub/d.jsonl", "checkpoint-4/d.jsonl")
    fill(tmp_path / "out", "metrics.jsonl", "samples.jsonl")
    for recipe in ("model/r.yaml", "config.yaml"):
        (tmp_path / "out" / recipe).write_text("seed: 3")
    (tmp_path / "link").symlink_to(tmp_path / "out" / "model")
    fill(tmp_path / "linked")
    (tmp_path / "linked" / "d.jsonl").symlink_to(tmp_path / "out" / "model" / "d.jsonl")
    parsed = options(tmp_path, **{option: tmp_path / name if name != "." else tmp_path})
    with pytest.raises(UsageError, match=option):
        refuse_run_over_source(parsed)


def test_a_model_folder_that_is_a_link_is_written_through(tmp_path):
    fill(tmp_path / "disk", "d.jsonl")
    fill(tmp_path / "out")
    (tmp_path / "out" / "model").symlink_to(tmp_path / "disk")
    with pytest.raises(UsageError, match="dataset"):
        refuse_run_over_source(options(tmp_path, dataset=tmp_path / "disk" / "d.jsonl"))


def test_what_a_run_may_read_in_its_own_folder(tmp_path, monkeypatch):
    out = fill(tmp_path / "out", "d.jsonl", "base/config.json", "checkpoint-4/x")
    (out / "config.yaml").write_text("seed: 3")
    (out / "recipe.yaml").write_text("seed: 3")
    mark_run(out)
    monkeypatch.chdir(tmp_path)
    for changed in (
        {"dataset": out / "d.jsonl"}, {"model_name_or_path": out / "base"},
        {"config": out / "config.yaml"}, {"config": out / "recipe.yaml"},
        {"resume": out / "checkpoint-4"}, {"model_name_or_path": "demo", "dataset": "demo"},
        {"data_cache_dir": out / "cache"}, {"data_cache_dir": tmp_path},
        {"model_name_or_path": "Qwen/Qwen3-30B-A3B"}, {"dataset": "org/name:test"},
    ):  # fmt: skip
        refuse_run_over_source(options(tmp_path, **changed))


def test_the_paths_that_are_read_are_all_looked_at():
    """An option of ours that names a path belongs into READS, or is judged here."""
    judged = {"output_dir", "dataset_config", "dataset_revision", "dataset_split"}
    parsed = parse_options(["--model_name_or_path", "demo", "--dataset", "demo"])
    ours = {*vars(parsed.model), *vars(parsed.data)}
    words = ("dir", "path", "dataset", "file", "folder")
    named = {name for name in ours if any(word in name for word in words)}
    assert named - judged - {"dataset_format"} == {option for option, _ in READS} - {
        "config", "resume",
    }  # fmt: skip
    assert os.sep not in parsed.train.resume

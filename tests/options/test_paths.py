"""`~` and `$HOME` mean the same folder to every part of a run, whoever wrote them and where."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

import pytest

from qwen3_sft.commands import export as export_module
from qwen3_sft.commands import resume as resume_module
from qwen3_sft.errors import UsageError
from qwen3_sft.launch.choice import choose
from qwen3_sft.options.data_args import DataArguments
from qwen3_sft.options.model_args import ModelArguments
from qwen3_sft.options.paths import PATH_OPTIONS, expanded
from qwen3_sft.options.recipe import parse_options
from qwen3_sft.options.train_args import TrainArguments

LEAST = {"model_name_or_path": "some/model", "dataset": "rows.jsonl"}
LISTS = ("dataset", "eval_dataset")

# Options that speak of files without being a path.
NO_PATHS = {
    "accelerator_config": "refused",
    "deepspeed": "refused",
    "fsdp_config": "refused",
    "push_to_hub": "says what is uploaded",
    "hub_model_id": "its default is the folder's name",
    "resume_from_checkpoint": "refused",
    "dataset_format": "a word",
    "dataset_split": "a word",
    "dataset_config": "a word",
    "txt_rows": "a word",
    "project": "a name: separators are refused",
    "run_name": "a name: separators are refused",
    "fp8_keep": "patterns of modules",
}


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    """A home of the test's own, and a variable."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.delenv("NOT_SET", raising=False)
    return tmp_path


def words(options):
    return [word for name, value in options.items() for word in (f"--{name}", value)]


def test_every_option_that_speaks_of_files_is_listed():
    speaks = re.compile(r"\b(path|dir|directory|folder|file)s?\b")
    found = set()
    for kind in (ModelArguments, DataArguments, TrainArguments):
        for field in (f for f in dataclasses.fields(kind) if f.init):
            text = f"{field.name.replace('_', ' ')} {field.metadata.get('help', '')}".lower()
            if speaks.search(text):
                found.add(field.name)
    unjudged = found - set(PATH_OPTIONS) - NO_PATHS.keys()
    assert not unjudged, "add each to PATH_OPTIONS, or say in NO_PATHS why it is none"
    assert not set(PATH_OPTIONS) & NO_PATHS.keys()


@pytest.mark.parametrize("written", ["~/a b", "$HOME/a b", "${HOME}/a b", "$SCRATCH/a b"])
@pytest.mark.parametrize("name", PATH_OPTIONS)
def test_expanded_from_both_sources(name, written, home):
    expected = str(home / ("scratch/a b" if "SCRATCH" in written else "a b"))
    value = [expected] if name in LISTS else expected
    given = words({**LEAST, name: written})
    assert parse_options(given).values()[name] == value
    recipe = home / "recipe.yaml"
    recipe.write_text(f"{name}: {written}\n")
    given = words({key: v for key, v in LEAST.items() if key != name})
    options = parse_options(["--config", str(recipe), *given])
    assert options.values()[name] == value
    assert options.resolved()[name] == value


def test_every_entry_of_a_list(home):
    words = ["--model_name_or_path", "m", "--dataset", "~/a", "org/name", "$HOME/b"]
    options = parse_options(words)
    assert options.data.dataset == [f"{home}/a", "org/name", f"{home}/b"]


def test_what_is_no_path_stays():
    options = parse_options([*words(LEAST), "--resume", "auto", "--run_name", "~ $HOME"])
    assert (options.model.model_name_or_path, options.train.resume) == ("some/model", "auto")
    assert options.train.run_name == "~ $HOME"


def test_the_recipe_itself(home):
    (home / "recipe.yaml").write_text("seed: 7\n")
    for written in ("~/recipe.yaml", "$HOME/recipe.yaml"):
        options = parse_options(["--config", written, *words(LEAST)])
        assert (options.train.seed, options.recipe) == (7, f"{home}/recipe.yaml")


@pytest.mark.parametrize("written", ["$NOT_SET/run", "${NOT_SET}", "~nobody_of_this_name/run"])
def test_an_unknown_variable_is_no_folder_of_that_name(written):
    with pytest.raises(UsageError, match=f"^--output_dir {re.escape(written)}: "):
        parse_options(words({**LEAST, "output_dir": written}))


def test_a_name_with_a_dollar_that_is_there_stays(home):
    (home / "a$b").mkdir()
    assert expanded(f"{home}/a$b", "--dataset") == f"{home}/a$b"


def test_paths_of_the_other_commands(home, monkeypatch):
    seen = {}
    monkeypatch.setattr(resume_module, "launch", lambda argv: seen.update(resume=argv) or 0)
    (home / "run").mkdir()
    (home / "run" / "config.yaml").write_text("model_name_or_path: m\ndataset: d.jsonl\n")
    assert resume_module.resume_command(["~/run"]) == 0
    assert seen["resume"][1::2] == [f"{home}/run/config.yaml", f"{home}/run"]
    own = export_module.parse(["~/run/checkpoint-4", "$HOME/out"])
    assert (own.checkpoint, own.folder) == (home / "run/checkpoint-4", home / "out")


def test_the_launch_file(home):
    (home / "launch.json").write_text('{"distributed_type": "NO"}')
    environment = {"ACCELERATE_CONFIG": "~/launch.json"}
    choice = choose([], gpus_per_node=0, gpu_memory_gib=None, environment=environment)
    assert choice.config == home / "launch.json"


def test_no_folder_is_named_after_a_tilde(home, monkeypatch):
    monkeypatch.chdir(home)
    options = parse_options(words({**LEAST, "output_dir": "~/run"}))
    options.output_dir.mkdir()
    assert options.output_dir == home / "run"
    assert os.listdir() == ["run"]
    assert options.output_dir == Path(str(options.train.output_dir))

"""Every shipped configuration file loads and does what its name says."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser

from qwen3_sft.dry_run import dry_run
from qwen3_sft.launch import launch_command
from qwen3_sft.recipe import parse_options
from tests.source_tree import ROOT

CONFIG = ROOT / "config"
LAUNCH_FILES = sorted(CONFIG.glob("*.json"))
ENGINE_FILES = sorted(CONFIG.glob("deepspeed/*.json"))
RECIPES = sorted(CONFIG.glob("recipe/*.yaml"))

# What `accelerate launch` must make of each file; a new file needs a line here.
DISTRIBUTED_TYPE = {
    "single": "NO",
    "ddp": "MULTI_GPU",
    "fsdp": "FSDP",
    "hsdp": "FSDP",
    "zero2": "DEEPSPEED",
    "zero3": "DEEPSPEED",
}


def name_of(path: Path) -> str:
    return str(path.relative_to(CONFIG))


def recipe_options(path: Path):
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    data = [] if "dataset" in recipe else ["--dataset", "conversations.jsonl"]
    return parse_options(["--config", str(path), *data])


def test_every_file_is_of_a_known_kind():
    known = {*LAUNCH_FILES, *ENGINE_FILES, *RECIPES}
    others = [name_of(p) for p in CONFIG.rglob("*") if p.is_file() and p not in known]
    assert not others, f"no test loads {others}: add a rule to tests/test_configs.py"
    assert len(LAUNCH_FILES) >= 2
    assert len(RECIPES) >= 2


@pytest.mark.parametrize("path", LAUNCH_FILES, ids=name_of)
def test_launch_file_loads_in_accelerate(path):
    assert path.stem in DISTRIBUTED_TYPE, f"add {path.stem!r} to DISTRIBUTED_TYPE in this test"
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    assert config.distributed_type.value == DISTRIBUTED_TYPE[path.stem]
    known = {field.name for field in dataclasses.fields(ClusterConfig)}
    assert set(json.loads(path.read_text(encoding="utf-8"))) <= known
    # The trainer owns the precision; autocast from accelerate would come on top of it.
    assert config.mixed_precision == "no"


@pytest.mark.parametrize("path", LAUNCH_FILES, ids=name_of)
def test_engine_file_that_a_launch_file_names_exists(path):
    engine = json.loads(path.read_text(encoding="utf-8")).get("deepspeed_config", {})
    if named := engine.get("deepspeed_config_file"):
        assert (ROOT / named) in ENGINE_FILES, f"{name_of(path)} names {named}"


@pytest.mark.parametrize("path", ENGINE_FILES, ids=name_of)
def test_engine_file_is_for_the_stage_of_its_name(path):
    engine = json.loads(path.read_text(encoding="utf-8"))
    assert f"zero{engine['zero_optimization']['stage']}" == path.stem


@pytest.mark.parametrize("gpus", [0, 1, 8])
def test_default_launch_file_exists(monkeypatch, gpus):
    monkeypatch.delenv("ACCELERATE_CONFIG", raising=False)
    # Stands in for the machine, not for torch: this suite runs where there are no GPUs.
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    command = launch_command(["--dry_run", "true"])
    parsed = launch_command_parser().parse_args(command[command.index("--quiet") :])
    assert Path(parsed.config_file) in LAUNCH_FILES
    assert parsed.num_processes == (gpus if gpus > 1 else None)
    assert (parsed.module, parsed.training_script) == (True, "qwen3_sft.train")
    assert parsed.training_script_args == ["--dry_run", "true"]


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_recipe_arrives_unchanged(path):
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    options = recipe_options(path)
    values = {**vars(options.model), **vars(options.data), **options.train_values}
    assert recipe == {key: values[key] for key in recipe}
    assert Path(recipe["output_dir"]).parts[0] == "runs", "runs/ is what .gitignore covers"


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_recipe_yields_a_plan(path, caplog, monkeypatch, tmp_path):
    """On the meta device, from the known configurations: options, patches, memory."""
    monkeypatch.chdir(tmp_path)
    with caplog.at_level("INFO", logger="monkey_patch"):
        lines = list(dry_run(recipe_options(path)))
    patches = [r.getMessage() for r in caplog.records if r.getMessage().startswith("patch ")]
    assert len(patches) >= 3, patches
    assert all(int(line.split(": ")[1].split()[0]) > 0 for line in patches)
    assert any(line.startswith("attention: ") for line in lines)
    assert sum("GiB" in line for line in lines) >= 4
    assert not list(tmp_path.iterdir()), "a dry run leaves nothing behind"


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_recipe_is_accepted_by_transformers(path, tmp_path):
    options = recipe_options(path)
    options.train_values |= {"output_dir": str(tmp_path), "use_cpu": True}
    args = options.train_arguments()
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps >= 1


def test_30b_plan_counts_the_published_parameters(caplog):
    """30.5 billion in total (model card of Qwen/Qwen3-30B-A3B), 48 layers of experts."""
    with caplog.at_level("INFO", logger="monkey_patch"):
        lines = list(dry_run(recipe_options(CONFIG / "recipe" / "qwen3_30b_a3b.yaml")))
    assert any("30.532 billion parameters" in line for line in lines)
    text = "\n".join(lines)
    # float32 with AdamW: 4 + 4 + 8 bytes per parameter
    total = 30.532122624 * 16 * 1e9 / 2**30
    assert f"{total:.2f} GiB  in total" in text

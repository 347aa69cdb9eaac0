"""Every shipped configuration file loads and does what its name says."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DeepSpeedPlugin

from qwen3_sft.commands import plan
from qwen3_sft.distributed.engine import detect
from qwen3_sft.dry_run import dry_run
from qwen3_sft.launch.accelerate_environment import accelerate_environment
from qwen3_sft.launch.choice import choose
from qwen3_sft.launch.launch import launch_command
from qwen3_sft.options.command_line import read_options
from qwen3_sft.options.data_args import DataArguments
from qwen3_sft.options.model_args import ModelArguments
from qwen3_sft.options.recipe import parse_options
from tests.support.source_tree import ROOT

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
    "zero3_offload": "DEEPSPEED",
    "zero3_threshold": "DEEPSPEED",
}

# What each file must tell its processes, beside the type: the variables of accelerate's launcher.
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "Qwen3MoeDecoderLayer",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
}
HSDP = {
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2",
    "PARALLELISM_CONFIG_DP_SHARD_SIZE": "8",
    "PARALLELISM_CONFIG_TP_SIZE": "1",
    "PARALLELISM_CONFIG_CP_SIZE": "1",
    "PARALLELISM_CONFIG_SP_SIZE": "1",
}
VARIABLES = {
    "ddp": {},
    "fsdp": FSDP,
    "hsdp": {**FSDP, **HSDP},
    "zero2": {"ACCELERATE_USE_DEEPSPEED": "true"},
    "zero3": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true"},
}

# What a recipe is written for.
GPUS = {
    "1gpu": "1xH200",
    "8xh200": "8xH200",
    "8xb200": "8xB200",
    "32k": "8xH200",
    "2nodes": "16xH200",
}


def name_of(path: Path) -> str:
    return str(path.relative_to(CONFIG))


def recipe_options(path: Path, *words: str):
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    data = [] if "dataset" in recipe else ["--dataset", "conversations.jsonl"]
    return parse_options(["--config", str(path), *data, *words])


def test_every_file_is_of_a_known_kind():
    known = {*LAUNCH_FILES, *ENGINE_FILES, *RECIPES}
    others = [name_of(p) for p in CONFIG.rglob("*") if p.is_file() and p not in known]
    assert not others, f"no test loads {others}: add a rule to tests/house/test_configs.py"
    assert {p.stem for p in LAUNCH_FILES} == set(DISTRIBUTED_TYPE)
    assert len(RECIPES) >= 7


@pytest.mark.parametrize("path", LAUNCH_FILES, ids=name_of)
def test_launch_file_loads_in_accelerate(path):
    assert path.stem in DISTRIBUTED_TYPE, f"add {path.stem!r} to DISTRIBUTED_TYPE in this test"
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    assert config.distributed_type.value == DISTRIBUTED_TYPE[path.stem]
    known = {field.name for field in dataclasses.fields(ClusterConfig)}
    assert set(json.loads(path.read_text(encoding="utf-8"))) <= known
    # The trainer owns the precision; autocast from accelerate would come on top of it. Beside a
    # deepspeed_config_file accelerate refuses the key, whatever its value.
    expected = None if config.distributed_type.value == "DEEPSPEED" else "no"
    assert config.mixed_precision == expected


@pytest.mark.parametrize("path", [p for p in LAUNCH_FILES if p.stem != "single"], ids=name_of)
def test_processes_are_told_the_engine(path, monkeypatch):
    """Through accelerate's own launcher code, from the repository root, as it would be typed."""
    monkeypatch.chdir(ROOT)
    processes = json.loads(path.read_text(encoding="utf-8"))["num_processes"]
    # As of one machine: of several, accelerate_environment() corrects the sizes of HSDP.
    found = accelerate_environment(f"config/{path.name}", processes)
    expected = VARIABLES[path.stem.split("_")[0]]
    assert expected == {key: found.get(key) for key in expected}
    assert found["ACCELERATE_MIXED_PRECISION"] == "no"
    unset = {"ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_PARALLELISM_CONFIG"}
    assert not (unset - set(expected)) & set(found)
    engine = detect(ModelArguments(), DataArguments(), {**found, "WORLD_SIZE": "8"})
    kind = {"hsdp": "fsdp"}.get(path.stem, path.stem.split("_")[0])
    assert engine.kind == kind


@pytest.mark.parametrize("name", [p.stem for p in LAUNCH_FILES if p.stem.startswith("zero")])
def test_accelerate_accepts_the_deepspeed_file(name, monkeypatch):
    """It refuses some keys of a launch file beside a deepspeed_config_file, inside of a rank."""
    monkeypatch.chdir(ROOT)
    for key, value in accelerate_environment(f"config/{name}.json", 8).items():
        monkeypatch.setenv(key, value)
    plugin = DeepSpeedPlugin()
    plugin.set_mixed_precision("bf16")
    assert plugin.deepspeed_config["bf16"]["enabled"] is True
    assert plugin.zero_stage == (2 if name == "zero2" else 3)
    assert plugin.zero3_init_flag == (name != "zero2")
    assert plugin.offload_optimizer_device == ("cpu" if "offload" in name else "none")


@pytest.mark.parametrize("path", LAUNCH_FILES, ids=name_of)
def test_engine_file_that_a_launch_file_names_exists(path):
    engine = json.loads(path.read_text(encoding="utf-8")).get("deepspeed_config", {})
    if named := engine.get("deepspeed_config_file"):
        assert (ROOT / named) in ENGINE_FILES, f"{name_of(path)} names {named}"


@pytest.mark.parametrize("path", ENGINE_FILES, ids=name_of)
def test_engine_file_is_for_the_stage_of_its_name(path):
    engine = json.loads(path.read_text(encoding="utf-8"))
    assert f"zero{engine['zero_optimization']['stage']}" == path.stem.split("_")[0]


@pytest.mark.parametrize("gpus", [0, 1, 8])
def test_default_launch_file_exists(gpus):
    argv = ["--config", str(CONFIG / "recipe" / "demo.yaml")]
    choice = choose(argv, gpus_per_node=gpus, gpu_memory_gib=140.4, environment={})
    assert choice.config in LAUNCH_FILES
    command = launch_command(argv, choice)
    if gpus <= 1:
        assert command[1:] == ["-m", "qwen3_sft.train", *argv]
        return
    parsed = launch_command_parser().parse_args(command[command.index("--quiet") :])
    assert Path(parsed.config_file) in LAUNCH_FILES
    assert parsed.num_processes == gpus
    assert (parsed.module, parsed.training_script) == (True, "qwen3_sft.train")
    assert parsed.training_script_args == argv


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_recipe_arrives_unchanged(path):
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    options = recipe_options(path)
    values = options.values()
    recipe.pop("planned_for", None)
    assert recipe == {key: values[key] for key in recipe}
    assert Path(recipe["output_dir"]).parts[0] == "runs", "runs/ is what .gitignore covers"


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_recipe_yields_a_plan(path, caplog, monkeypatch, tmp_path):
    """On the meta device, from the known configurations: options, patches, memory."""
    monkeypatch.chdir(tmp_path)
    with caplog.at_level("INFO", logger="monkey_patch"):
        lines = list(dry_run(recipe_options(path), {}))
    patches = [r.getMessage() for r in caplog.records if r.getMessage().startswith("patch ")]
    assert len(patches) >= 3, patches
    assert all(int(line.split(": ")[1].split()[0]) > 0 for line in patches)
    assert any(line.startswith("attention: ") for line in lines)
    assert sum("GiB" in line for line in lines) >= 4
    assert not list(tmp_path.iterdir()), "a dry run leaves nothing behind"


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_recipe_is_accepted_by_transformers(path, tmp_path):
    options = recipe_options(path)
    options = options.replaced(output_dir=str(tmp_path), use_cpu=True)
    args = options.train.arguments()
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps >= 1


@pytest.mark.parametrize("name", GPUS)
def test_numbers_in_a_recipe_are_those_of_the_plan(name):
    path = CONFIG / "recipe" / f"qwen3_30b_a3b_{name}.yaml"
    lines, exit_code = plan.command([str(path)])  # for its `planned_for`
    assert exit_code == 0, "a shipped recipe has to fit"
    assert read_options(["--config", str(path)], needs_data=False).planned_for == GPUS[name]
    found = list(lines)
    start = next(i for i, line in enumerate(found) if line.startswith("memory per GPU"))
    comment = "\n".join(f"# {line}" for line in found[start:])
    text = path.read_text(encoding="utf-8")
    assert comment in text, f"put this into {path.name}:\n{comment}"
    command = f"`qwen3-sft plan config/recipe/{path.name} --gpus {GPUS[name]}`"
    assert command in text.replace("\n# ", " ")


@pytest.mark.parametrize("name", GPUS)
def test_a_recipe_keeps_the_gpus_busy_and_its_global_batch(name):
    """At 16k tokens per GPU and micro-batch gathering hides behind computing."""
    path = CONFIG / "recipe" / f"qwen3_30b_a3b_{name}.yaml"
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    rows, processes = recipe["per_device_train_batch_size"], int(GPUS[name].split("x")[0])
    assert rows * recipe["max_length"] >= 16_384
    if processes > 1:
        assert recipe["global_batch_size"] % (rows * processes) == 0
        assert recipe["global_batch_size"] * recipe["max_length"] == 524_288
    assert recipe["activation_checkpointing"] == "auto"
    words = path.read_text(encoding="utf-8").replace("\n# ", " ")
    assert f"{rows * recipe['max_length']:,} tokens" in words
    # As nvidia-smi reports: H200 143,771 MiB, B200 183,359 MiB.
    mib = 183_359 if "B200" in words else 143_771
    assert f"({mib / 1024:.1f} GiB" in words


def test_30b_plan_counts_the_published_parameters(caplog):
    """30.5 billion in total (model card of Qwen/Qwen3-30B-A3B), 48 layers of experts."""
    with caplog.at_level("INFO", logger="monkey_patch"):
        lines = list(dry_run(recipe_options(CONFIG / "recipe" / "qwen3_30b_a3b.yaml")))
    assert any("30.532 billion parameters" in line for line in lines)
    text = "\n".join(lines)
    # float32 with AdamW: 4 + 4 + 8 bytes per parameter
    size = 30.532122624e9 / 2**30
    for row in (f"{4 * size:.2f} GiB  weights", f"{8 * size:.2f} GiB  optimizer (AdamW"):
        assert row in text

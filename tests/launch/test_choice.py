"""Which launch file and sharding a run gets, and why."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest

from qwen3_sft.errors import UsageError
from qwen3_sft.launch.accelerate_environment import single_process_environment
from qwen3_sft.launch.choice import choose, deepspeed_file, launch_environment
from qwen3_sft.launch.launch import launch, launch_command
from qwen3_sft.logs import _CHATTY_AT_IMPORT
from tests.support.source_tree import ROOT

CONFIG = ROOT / "config"
DEMO = ["--config", str(CONFIG / "recipe/demo.yaml")]
LARGE = ["--model_name_or_path", "Qwen/Qwen3-30B-A3B", "--dataset", "conversations.jsonl"]
H200, H100 = 140.4, 79.6


def chosen(argv=LARGE, gpus=8, nodes=1, memory=H200, environment=None):
    return choose(
        argv, gpus_per_node=gpus, nodes=nodes, gpu_memory_gib=memory, environment=environment or {}
    )


@pytest.mark.parametrize(("gpus", "reason"), [(0, "no GPU"), (1, "one GPU")])
def test_one_process_needs_no_engine(gpus, reason):
    # The options are not even read: the run itself says what is wrong with them.
    choice = chosen(["--nonsense"], gpus, memory=None)
    assert (choice.config.name, choice.accelerate_flags, choice.run_flags) == (
        "single.json",
        [],
        [],
    )
    assert choice.reason == reason


def test_a_small_model_is_copied():
    choice = chosen(DEMO, memory=24.0)
    assert (choice.config.name, choice.run_flags) == ("ddp.json", [])
    assert choice.accelerate_flags == ["--num_processes", "8"]
    assert "whole copy takes 0.1 GiB, 60% of a GPU with 24.0 GiB is 14.4 GiB" in choice.reason


def test_a_large_model_is_sharded_over_the_node():
    choice = chosen()
    assert (choice.config.name, choice.run_flags) == ("ddp.json", ["--fsdp_size", "-1"])
    assert "571.2 GiB" in choice.reason
    assert "shards of 63.3 GiB over 8 GPUs" in choice.reason
    assert "do not fit" not in choice.reason


def test_nodes_hold_a_copy_each_if_it_fits():
    hybrid = chosen(nodes=2)
    assert hybrid.run_flags == ["--dp_replicate_size", "2", "--fsdp_size", "8"]
    assert hybrid.accelerate_flags == ["--num_processes", "16"]
    flat = chosen(nodes=2, memory=H100)
    assert flat.run_flags == ["--fsdp_size", "-1"]
    assert "over 16 GPUs" in flat.reason


def test_the_margin_decides():
    """A whole copy of the 30B model in bfloat16 takes 10 bytes per parameter: 284.4 GiB."""
    half = [*LARGE, "--dtype", "bfloat16"]
    assert chosen(half, memory=284.4 / 0.6 + 1).run_flags == []
    assert chosen(half, memory=284.4 / 0.6 - 1).run_flags == ["--fsdp_size", "-1"]


def test_what_does_not_fit_is_said():
    assert "try ACCELERATE_CONFIG=config/zero3_offload.json" in chosen(gpus=2).reason
    assert "unknown" in chosen(memory=None).reason


@pytest.mark.parametrize("own", [["--fsdp_size=4"], ["--ep_size", "2"], ["--fsdp_size", "1"]])
def test_sizes_of_the_user_win(own):
    choice = chosen([*LARGE, *own])
    assert (choice.config.name, choice.run_flags) == ("ddp.json", [])
    assert own[0].split("=")[0] in choice.reason


def test_sizes_of_the_recipe_win(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("dp-replicate-size: 2\nfsdp_size: 4\n", encoding="utf-8")
    choice = chosen([*LARGE, "--config", str(recipe)])
    assert choice.run_flags == []
    assert "--fsdp_size and --dp_replicate_size" in choice.reason


def test_a_model_that_is_not_here_is_assumed_to_be_large(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    choice = chosen(["--model_name_or_path", "nobody/nothing", "--dataset", "x.jsonl"])
    assert choice.run_flags == ["--fsdp_size", "-1"]
    assert choice.reason.startswith("nobody/nothing is not here yet, taken to be as large as Qwen/")


def test_wrong_options_are_refused_before_anything_starts():
    with pytest.raises(UsageError, match="unknown option --nonsense"):
        chosen([*LARGE, "--nonsense"])


def test_launch_file_of_the_user_wins():
    choice = chosen(environment={"ACCELERATE_CONFIG": str(CONFIG / "fsdp.json")})
    assert (choice.config.name, choice.run_flags) == ("fsdp.json", [])
    with pytest.raises(UsageError, match="no such file"):
        chosen(environment={"ACCELERATE_CONFIG": "nowhere.json"})


@pytest.mark.parametrize("name", ["zero2", "zero3", "zero3_offload", "zero3_threshold"])
def test_deepspeed_file_is_found_from_anywhere(monkeypatch, tmp_path, name):
    expected = CONFIG / f"deepspeed/{name}.json"
    for folder in (ROOT, tmp_path):
        monkeypatch.chdir(folder)
        assert deepspeed_file(CONFIG / f"{name}.json") == expected
    choice = chosen(environment={"ACCELERATE_CONFIG": str(CONFIG / f"{name}.json")})
    command = launch_command(["--x"], choice)
    assert command[command.index("--deepspeed_config_file") + 1] == str(expected)


def test_deepspeed_file_that_is_missing_is_named(tmp_path):
    launch_file = tmp_path / "mine.json"
    text = (CONFIG / "zero3.json").read_text(encoding="utf-8")
    launch_file.write_text(text.replace("zero3.json", "gone.json"), encoding="utf-8")
    with pytest.raises(UsageError, match=r"gone\.json is in none of"):
        deepspeed_file(launch_file)


def test_processes_would_recognise_the_engine(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def environment(name: str) -> dict[str, str]:
        return launch_environment(
            chosen(environment={"ACCELERATE_CONFIG": str(CONFIG / f"{name}.json")})
        )

    assert environment("single") == {}
    hsdp = environment("hsdp")
    assert (hsdp["WORLD_SIZE"], hsdp["LOCAL_WORLD_SIZE"]) == ("16", "8")
    assert hsdp["PARALLELISM_CONFIG_DP_SHARD_SIZE"] == "8"
    zero3 = environment("zero3")
    named = zero3["ACCELERATE_DEEPSPEED_CONFIG_FILE"]
    assert json.loads(Path(named).read_text(encoding="utf-8"))["zero_optimization"]["stage"] == 3
    assert environment("ddp")["WORLD_SIZE"] == "8"


@pytest.fixture
def our_logging(capsys):
    """Standard output as a run prints it; afterwards the loggers are as they were."""
    loggers = [logging.getLogger(n) for n in ("qwen3_sft", "monkey_patch", *_CHATTY_AT_IMPORT)]
    before = [(log.handlers, log.level, log.propagate) for log in loggers]
    yield capsys
    for log, (handlers, level, propagate) in zip(loggers, before, strict=True):
        log.handlers, log.propagate = handlers, propagate
        log.setLevel(level)


def test_dry_run_plans_the_engine_that_would_run(monkeypatch, our_logging, tmp_path):
    """The whole way of `DRY_RUN=1 ACCELERATE_CONFIG=... qwen3-sft train`, in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DRY_RUN", "1")
    monkeypatch.setenv("ACCELERATE_CONFIG", str(CONFIG / "zero3.json"))
    before = dict(os.environ)
    assert launch(LARGE) == 0
    assert dict(os.environ) == before
    text = our_logging.readouterr().out
    assert "as ACCELERATE_CONFIG says" in text
    assert "ZeRO-3 units: 48 x Qwen3MoeDecoderLayer of 623.1 M parameters" in text
    assert "engine: zero3 over 8 processes" in text
    assert "70.23 GiB  in total" in text
    monkeypatch.setenv("ACCELERATE_CONFIG", str(tmp_path / "nowhere.json"))
    assert launch(LARGE) == 2
    assert "nowhere.json: no such file" in our_logging.readouterr().out


def test_a_shipped_launch_file_takes_the_gpus_that_are_there(tmp_path):
    """Eight processes is our guess; in a file of the user's own the number is meant."""
    shipped = CONFIG / "fsdp.json"
    own = tmp_path / "own.json"
    own.write_text(shipped.read_text(encoding="utf-8"), encoding="utf-8")

    def flags(file, gpus):
        return choose(
            DEMO,
            gpus_per_node=gpus,
            gpu_memory_gib=80.0,
            environment={"ACCELERATE_CONFIG": str(file)},
        ).accelerate_flags

    assert flags(shipped, 4) == ["--num_processes", "4"]
    assert flags(shipped, 0) == []
    assert flags(own, 4) == []
    assert flags(CONFIG / "single.json", 4) == []
    assert flags(CONFIG / "hsdp.json", 4) == [], "its shards and replicas are counted in the file"


@pytest.mark.parametrize("threads", [None, "3"])
def test_one_process_finds_what_accelerate_would_set(threads, monkeypatch):
    """Its launcher, which takes seconds to import, is left out."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if threads is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # the file wins
    before = dict(os.environ)
    words = ["--config_file", str(CONFIG / "single.json"), "-m", "qwen3_sft.train", "--x"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    command, expected = prepare_simple_launcher_cmd_env(args)
    assert single_process_environment(before) == expected
    assert launch_command(["--x"], chosen(gpus=1)) == command


@pytest.mark.parametrize("content", ["{", "[]", "a: b", "\udcff", None])
def test_a_file_that_is_no_launch_file(tmp_path, content):
    path = tmp_path / "launch.json"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UsageError, match=r"launch file .*launch\.json: "):
        chosen(environment={"ACCELERATE_CONFIG": str(path)})

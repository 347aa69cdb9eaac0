"""`--fp8`: what it resolves to, what it refuses, what a run records, and the plan's row."""

from __future__ import annotations

import json
from typing import get_args

import pytest
import torch
import yaml

from monkey_patch.kernels.fp8_device import fp8_problem
from monkey_patch.kernels.scatter_moe.quantize import Scaling
from qwen3_sft.errors import UsageError
from qwen3_sft.model.fp8 import Fp8Choice, choose_fp8, device_problem
from qwen3_sft.options.model_args import ModelArguments
from qwen3_sft.run import run_command
from tests.support.source_tree import ROOT

CPU = torch.device("cpu")
RECIPE = ROOT / "config" / "recipe" / "qwen3_30b_a3b_fp8.yaml"


def choose(fp8: str, packing: bool = True, measured=None, **options) -> Fp8Choice:
    model = ModelArguments(fp8=fp8, **options)
    return choose_fp8(model, CPU, packing=packing, measured=measured)


@pytest.mark.parametrize(
    ("word", "attention", "experts"),
    [
        ("off", False, False), ("attention", True, False), ("experts", False, True),
        ("all", True, True),
    ],
)  # fmt: skip
def test_words(word, attention, experts):
    assert choose(word) == Fp8Choice(attention, experts)
    assert bool(choose(word)) is (word != "off")


def test_auto_follows_what_was_measured(caplog):
    row = {"attention": 0.97, "experts": 1.2, "source": "bench/results/gpu/fp8.json"}
    with caplog.at_level("INFO", logger="qwen3_sft"):
        assert choose("auto", measured={"cpu": row}) == Fp8Choice(False, True)
        assert not choose("auto", measured={"H200 SXM": row})
        assert not choose("auto"), "nothing is measured yet, so nothing may be claimed"
    assert "attention x 0.97, experts x 1.20 (bench/results/gpu/fp8.json)" in caplog.text
    assert "nothing is measured on cpu yet" in caplog.text


def test_auto_follows_the_scaling_that_is_asked_for(caplog):
    row = {"attention": 1.1, "experts": 1.2, "experts_mxfp8": 1.4, "source": "x"}
    with caplog.at_level("INFO", logger="qwen3_sft"):
        assert choose("auto", measured={"cpu": row}) == Fp8Choice(True, True)
        assert "--fp8_scaling mxfp8 was faster here: x 1.40" in caplog.text
        caplog.clear()
        assert choose("auto", measured={"cpu": row}, fp8_scaling="mxfp8").experts
        assert "experts_mxfp8 x 1.40" in caplog.text
        assert "was faster here" not in caplog.text
    del row["experts_mxfp8"]
    assert not choose("auto", measured={"cpu": row}, fp8_scaling="mxfp8").experts, "never timed"


@pytest.mark.parametrize("scaling", ["", *get_args(Scaling)])
def test_devices_are_those_of_the_kernels(scaling):
    """The command line refuses, in its own words, what the kernels would refuse."""
    for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)):
        ours = device_problem(capability, scaling)
        kernels = fp8_problem("cuda", capability, scaling)
        assert (ours is None) == (kernels is None), capability
        least = (10, 0) if scaling == "mxfp8" else (8, 9)
        assert (ours is None) == (capability >= least), capability
    if scaling == "mxfp8":
        assert "set --fp8_scaling blockwise" in device_problem((9, 0), scaling)
        assert "set the scaling blockwise" in fp8_problem("cuda", (9, 0), scaling)


def test_refusals():
    with pytest.raises(UsageError, match="only scatter_moe has FP8 products"):
        choose("experts", experts_implementation="grouped_mm")
    assert choose("attention", experts_implementation="grouped_mm").attention
    with pytest.raises(UsageError, match=r"--fp8_keep .* without --fp8"):
        choose("off", fp8_keep=["*"])
    with pytest.raises(UsageError, match="one scale for all tokens of a row"):
        choose("all", fp8_recipe="tensorwise")
    assert choose("all", packing=False, fp8_recipe="tensorwise")
    assert choose("experts", fp8_recipe="tensorwise").experts, "the experts' scales are their own"


@pytest.fixture
def base(tokenizer, tmp_path):
    from qwen3_sft.demo.model import tiny_config, tiny_model

    config = tiny_config(
        len(tokenizer), hidden_size=64, moe_intermediate_size=48, num_hidden_layers=4,
        num_experts=8, head_dim=16,
    )  # fmt: skip
    tiny_model(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = [
        {"messages": [{"role": "user", "content": f"{i} + {i}"},
                      {"role": "assistant", "content": str(2 * i)}]}
        for i in range(40)
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_the_shipped_recipe_runs_emulated(base, caplog):
    """One process; tests/distributed/test_engines.py has FSDP2 and ZeRO-3."""
    argv = [
        "--config", RECIPE, "--model_name_or_path", base / "base", "--dataset",
        base / "rows.jsonl", "--data_cache_dir", base / "cache", "--output_dir", base / "run",
        "--use_cpu", "true", "--bf16", "false", "--max_length", 128, "--max_steps", 2,
        "--per_device_train_batch_size", 1, "--global_batch_size", 1, "--eval_fraction", 0,
        "--eval_strategy", "no", "--dataloader_num_workers", 0, "--activation_checkpointing",
        "selective", "--fp8_keep", "*layers.2.self_attn*",
    ]  # fmt: skip
    with caplog.at_level("INFO", logger="qwen3_sft"):
        assert run_command([str(word) for word in argv]) == 0
    record = json.loads((base / "run" / "environment.json").read_text())
    projections = [f"model.layers.1.self_attn.{p}_proj" for p in "qkvo"]
    experts = [f"model.layers.{i}.mlp.experts" for i in (1, 2)]
    assert sorted(record["fp8"]["converted"]) == sorted(projections + experts)
    kept = record["fp8"]["kept"]
    assert kept["model.layers.1.mlp.gate"] == "router"
    assert kept["model.layers.0.mlp.experts"] == "first decoder layer"
    assert kept["model.layers.3.self_attn.q_proj"] == "last decoder layer"
    assert kept["lm_head"] == "lm_head"
    assert "*layers.2.self_attn*" in kept["model.layers.2.self_attn.q_proj"]
    assert f"FP8: {record['fp8']['share']:.1%} of linear FLOPs in 2 layers" in caplog.text
    resolved = yaml.safe_load((base / "run" / "config.yaml").read_text())
    assert resolved["fp8"] == "all"
    from safetensors.torch import load_file

    weights = load_file(base / "run" / "model" / "model.safetensors")
    assert {t.dtype for t in weights.values()} == {torch.float32}, "as the base model's"


def test_resume_repeats_the_rest_to_the_last_bit(base):
    from safetensors.torch import load_file

    def run(name, *more):
        argv = [
            "--model_name_or_path", base / "base", "--dataset", base / "rows.jsonl",
            "--data_cache_dir", base / "cache", "--output_dir", base / name, "--use_cpu", "true",
            "--max_length", 128, "--max_steps", 4, "--save_steps", 2, "--learning_rate", 1e-3,
            "--fp8", "all", *more,
        ]  # fmt: skip
        assert run_command([str(word) for word in argv]) == 0
        return load_file(base / name / "model" / "model.safetensors")

    whole = run("whole")
    resumed = run("resumed", "--resume", base / "whole" / "checkpoint-2")
    differing = [key for key, tensor in whole.items() if not torch.equal(tensor, resumed[key])]
    assert not differing

"""`qwen3-sft plan`: its contract, its verdict, its advice, and what `auto` chooses."""

from __future__ import annotations

import dataclasses
import json
import shlex

import pytest
import torch

from qwen3_sft.cli import main
from qwen3_sft.commands.plan import command
from qwen3_sft.distributed.engine import Engine
from qwen3_sft.errors import DoesNotFitError, UsageError
from qwen3_sft.model.meta_model import meta_model
from qwen3_sft.options.recipe import parse_options
from qwen3_sft.plan.activations import activation_plan
from qwen3_sft.plan.plan import Gpu
from qwen3_sft.plan.planner import experts_for, plan_run
from qwen3_sft.plan.weights import GIB
from qwen3_sft.training.arguments import completed, final_arguments
from tests.support.source_tree import ROOT

RECIPES = ROOT / "config" / "recipe"
ONE_GPU = str(RECIPES / "qwen3_30b_a3b_1gpu.yaml")
LAYERS = 48
# docs/design.md, contracts
KEYS = {
    "weights_gib", "gradients_gib", "optimizer_gib", "activations_gib", "temporaries_gib",
    "total_gib", "device_gib", "fits", "tokens_per_micro_batch", "tokens_per_second_per_gpu",
}  # fmt: skip


def planned(*argv: str) -> tuple[dict, int]:
    lines, code = command([*argv, "--format", "json"])
    (line,) = lines
    return json.loads(line), code


@pytest.fixture(scope="module")
def model():
    return meta_model("Qwen/Qwen3-30B-A3B")


def plan_of(model, gpu: Gpu | None = None, **values):
    argv = ["--model_name_or_path", "Qwen/Qwen3-30B-A3B"]
    options = parse_options(argv, needs_data=False).replaced(
        **{
            "dtype": "bfloat16", "optim": "adamw_torch_8bit", "optimizer_in_backward": True,
            "activation_checkpointing": "auto", **values,
        }
    )  # fmt: skip
    return plan_run(model, options, Engine("single"), gpu, torch.bfloat16, {})


def test_the_30b_on_one_h200():
    report, code = planned(ONE_GPU)
    assert report.keys() >= KEYS
    assert code == 0
    assert report["fits"]
    parts = ("weights", "gradients", "optimizer", "activations", "temporaries")
    total = sum(report[f"{part}_gib"] for part in parts)
    assert report["total_gib"] == pytest.approx(total, abs=0.01)
    assert report["total_gib"] <= report["device_gib"] == pytest.approx(143_771 / 1024, abs=0.01)
    assert report["weights_gib"] == pytest.approx(30_532_122_624 * 2 / GIB, abs=0.01)
    # Two states of one byte and a float32 scale for each 256.
    assert report["optimizer_gib"] == pytest.approx(30.532122624e9 * 2 * (1 + 4 / 256) / GIB, 0.001)
    assert report["gradients_gib"] < 2, "gradients exist one after the other"
    assert report["tokens_per_micro_batch"] >= 16_384


def test_what_does_not_fit_says_what_would():
    argv = (ONE_GPU, "--gpus", "1xH200", "--per_device_train_batch_size", "32")
    report, code = planned(*argv)
    assert code == 3
    assert not report["fits"]
    again, code = planned(*argv, *shlex.split(report["nearest"]))
    assert code == 0
    assert again["fits"]


def test_float32_adamw_is_sent_to_eight_bits_in_backward():
    report, code = planned(str(RECIPES / "qwen3_30b_a3b.yaml"), "--gpus", "1xH200")
    assert code == 3
    assert "--optimizer_in_backward true --optim adamw_torch_8bit" in report["nearest"]
    recipe = str(RECIPES / "qwen3_30b_a3b.yaml")
    assert planned(recipe, "--gpus", "1xH200", *shlex.split(report["nearest"]))[1] == 0


@pytest.mark.parametrize("rows", [7, 8])
def test_advice_is_one_that_a_run_takes(rows, tmp_path):
    """Also where half the rows do not divide the rows of a step, and with a step of many rows."""
    recipe = str(RECIPES / "qwen3_30b_a3b.yaml")
    sizes = ("--per_device_train_batch_size", str(rows), "--global_batch_size", str(8 * rows))
    more = ("--gradient_accumulation_steps", "1", *sizes)
    report, code = planned(recipe, "--gpus", "1xH200", *more)
    assert code == 3
    nearest = shlex.split(report["nearest"])
    assert planned(recipe, "--gpus", "1xH200", *more, *nearest)[1] == 0
    words = [*more, *nearest, "--use_cpu", "true", "--bf16", "false", "--output_dir", str(tmp_path)]
    options = parse_options(["--config", recipe, "--dataset", "d", *words])
    options = completed(options, Engine("single"), 1, has_bf16=False)
    args = final_arguments(options, Engine("single"))
    assert args.optimizer_in_backward
    assert args.gradient_accumulation_steps == 1


def test_nothing_fits_a_small_gpu():
    lines, code = command([ONE_GPU, "--gpus", "RTX 4090"])
    text = "\n".join(lines)
    assert code == 3
    assert "DOES NOT FIT" in text
    assert "use more GPUs" in text


def test_several_gpus_use_the_engine_of_the_launcher():
    report, code = planned(str(RECIPES / "qwen3_30b_a3b_8xh200.yaml"), "--gpus", "8xH200")
    assert code == 0
    assert report["engine"].startswith("native (fsdp_size 8")
    assert report["processes"] == 8
    assert report["weights_gib"] == pytest.approx(30_532_122_624 * 4 / 8 / GIB, abs=0.01)
    two_nodes, _ = planned(str(RECIPES / "qwen3_30b_a3b_2nodes.yaml"), "--gpus", "16xH200")
    assert "dp_replicate_size 2" in two_nodes["engine"]


@pytest.mark.parametrize("gpus", ["H900", "0xH200", "12xH200", "x"])
def test_gpus_that_are_not_known(gpus):
    with pytest.raises(UsageError, match=f"--gpus {gpus}"):
        command([ONE_GPU, "--gpus", gpus])


def test_the_command_prints_nothing_but_its_answer(capsys):
    assert main(["plan", ONE_GPU, "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out).keys() >= KEYS
    assert main(["plan", ONE_GPU, "--max_lenght", "8"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "did you mean --max_length?" in captured.err


# ---- auto ----


def fits_with_margin(plan) -> bool:
    """A tenth of what is not known to the byte stays free, and 6 GiB of an H200."""
    parts = plan.components()
    margin = 0.1 * (parts["activations"] + parts["temporaries"]) / GIB
    return plan.total_gib + max(margin, 0.043 * plan.gpu.memory_gib) <= plan.gpu.memory_gib


@pytest.mark.parametrize(
    ("tokens", "kinds"),
    [
        (2048, {"none"}),
        (20_480, {"selective", "none"}),
        (32_768, {"selective", "none"}),
        (65_536, {"full", "selective"}),
    ],
)
def test_auto_recomputes_no_more_than_it_must(model, tokens, kinds):
    """Oracle: with one layer less of the dearer policy there is no room."""
    gpu = Gpu("none", 165.0)
    plan = plan_of(model, gpu, max_length=tokens)
    assert set(plan.layers) == kinds
    assert sum(plan.layers.values()) == LAYERS
    assert fits_with_margin(plan)
    if kinds == {"none"}:
        return
    dear, cheap = ("full", "selective") if "full" in kinds else ("selective", "none")
    layers = {dear: plan.layers[dear] - 1, cheap: plan.layers[cheap] + 1}
    lighter = activation_plan(
        model.config, layers, compute_bytes=2, residual_bytes=2, keeps_hidden=False,
        chunk_tokens=4096,
    )  # fmt: skip
    assert not fits_with_margin(dataclasses.replace(plan, layers=layers, activations=lighter))


def test_auto_ends_with_the_leanest(model):
    plan = plan_of(model, Gpu("none", 120.0), max_length=65_536)
    assert plan.layers == {"full": LAYERS}
    assert plan.fits is False


def test_auto_without_a_gpu_recomputes_nothing(model):
    assert plan_of(model).layers == {"none": LAYERS}


def test_auto_knows_only_our_experts(model):
    with pytest.raises(UsageError, match="grouped_mm"):
        plan_of(model, Gpu.named("H200"), experts_implementation="grouped_mm")


def test_experts_follow_the_policy():
    assert experts_for("scatter_moe", {"none": 48}) == "scatter_moe"
    assert experts_for("scatter_moe", {"selective": 1, "none": 47}) == "scatter_moe_recompute"
    assert experts_for("grouped_mm", {"selective": 48}) == "grouped_mm"


def test_offload_moves_bytes_to_the_host(model):
    here = plan_of(model, Gpu.named("H200"), max_length=131_072, activation_offload=False)
    there = plan_of(model, Gpu.named("H200"), max_length=131_072, activation_offload=True)
    assert there.components()["activations"] < here.components()["activations"]


def test_check_raises_only_where_it_is_known_not_to_fit(model):
    plan_of(model).check()
    plan_of(model, Gpu.named("H200")).check()
    with pytest.raises(DoesNotFitError, match=r"a H100 SXM has 79\.6 GiB"):
        plan_of(model, Gpu.named("H100 SXM")).check()

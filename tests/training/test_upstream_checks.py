"""What transformers would refuse after the tokenising is refused before, naming the option."""

import inspect
import math
import os

import pytest
import torch
from transformers import TrainingArguments

from qwen3_sft.decisions import Machine, check_model, check_options, decide
from qwen3_sft.dry_run import dry_run
from qwen3_sft.errors import DataError, ModelError, UsageError
from qwen3_sft.model.meta_model import model_on_meta
from qwen3_sft.options.recipe import parse_options
from qwen3_sft.options.values import REPORTERS
from qwen3_sft.plan.disk import DiskUse
from qwen3_sft.start_checks import check_place
from qwen3_sft.training import upstream_checks

CPU = Machine(None, torch.device("cpu"))


def options(tmp_path, *words):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("")
    least = ["--model_name_or_path", "Qwen/Qwen3-30B-A3B", "--dataset", str(rows)]
    least += ["--output_dir", str(tmp_path / "run"), "--use_cpu", "true"]
    return parse_options([*least, *words])


EVAL = ("--eval_fraction", "0.1")
BEST = ("--load_best_model_at_end", "true")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (BEST, "--load_best_model_at_end true: .* neither --eval_fraction nor --eval_dataset"),
        ((*BEST, *EVAL, "--save_strategy", "no"), "--eval_strategy no and --save_strategy no"),
        (
            (*BEST, *EVAL, "--eval_strategy", "epoch", "--save_strategy", "steps"),
            "--eval_strategy epoch and --save_strategy steps",
        ),
        (
            (*BEST, *EVAL, "--eval_strategy", "steps", "--eval_steps", "3", "--save_steps", "4"),
            "--eval_steps 3 and --save_steps 4",
        ),
        (
            (*BEST, *EVAL, "--eval_strategy", "steps", "--eval_steps", "2", "--save_steps", "0.5"),
            r"--eval_steps 2 and --save_steps 0\.5",
        ),
        (("--lr_scheduler_type", "reduce_lr_on_plateau"), "reduce_lr_on_plateau needs evaluations"),
        (("--lr_scheduler_type", "greedy"), "--lr_scheduler_type greedy needs evaluations"),
        (("--eval_on_start", "true"), "--eval_on_start true needs evaluations"),
        (("--save_strategy", "best"), "--save_strategy best needs evaluations"),
        (
            ("--optim", "galore_adamw", "--optim_target_modules", "x"),
            "galore_torch is not installed",
        ),
        (("--optim", "paged_adamw_8bit"), "bitsandbytes is not installed"),
    ],
    ids=str,
)
def test_refused_without_a_model(tmp_path, words, message):
    with pytest.raises(UsageError, match=message):
        check_options(options(tmp_path, *words), CPU, {})


@pytest.mark.parametrize(
    ("name", "path", "words"),
    [
        ("dataset", "/nowhere/rows.json", "no such file or folder"),
        ("eval_dataset", "/nowhere/rows.json", "no such file or folder"),
        ("output_dir", "/etc/hostname/run", "--output_dir .* /etc/hostname is no folder"),
        ("data_cache_dir", "/etc/hostname", "--data_cache_dir .* is no folder"),
        ("output_dir", "/sys/run", "not writable|Operation not permitted"),
    ],
)
def test_places_are_looked_at_first(tmp_path, name, path, words, monkeypatch):
    if path.startswith("/sys"):  # root may write anywhere, says the kernel, until it is tried
        monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises((DataError, UsageError), match=words):
        check_place(options(tmp_path, f"--{name}", path))


def test_attention_that_is_not_here(tmp_path):
    with pytest.raises(ModelError, match="flash_attention_2 needs a CUDA device"):
        check_options(options(tmp_path, "--attn_implementation", "flash_attention_2"), CPU, {})


@pytest.mark.parametrize(
    "words",
    [
        (),
        (*BEST, *EVAL),
        (*BEST, *EVAL, "--eval_strategy", "steps", "--eval_steps", "0.1", "--save_steps", "0.3"),
        ("--lr_scheduler_type", "reduce_lr_on_plateau", *EVAL),
        ("--save_strategy", "best", *EVAL, "--eval_strategy", "epoch"),
        ("--report_to", "none"),
    ],
    ids=str,
)
def test_let_through(tmp_path, words):
    check_options(options(tmp_path, *words), CPU, {})


def test_every_reporter_is_known_and_looked_for(tmp_path):
    assert upstream_checks._REPORTERS.keys() == {*REPORTERS} - {"none", "all"}
    assert upstream_checks._REPORTERS.keys() == {
        *upstream_checks.integration_utils.INTEGRATION_TO_CALLBACK
    }
    for name, (is_available, _) in upstream_checks._REPORTERS.items():
        if not getattr(upstream_checks.integration_utils, is_available)():
            with pytest.raises(UsageError, match=f"--report_to {name}: not installed"):
                check_options(options(tmp_path, "--report_to", name), CPU, {})


def test_upstreams_own_validation_needs_no_device_and_no_process_group():
    source = inspect.getsource(TrainingArguments._validate_args)
    assert not {"self.device", "self._setup_devices", "self.world_size"} & set(source.split())
    assert list(inspect.signature(TrainingArguments._validate_args).parameters) == ["self"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--optim", "sgd", "--optim_args", "momentum=x"), "--optim sgd --optim_args momentum=x"),
        (("--optim", "sgd", "--optim_args", "momentum=-1"), "Invalid momentum"),
        (("--optim", "adamw_torch_8bit", "--optim_args", "states=foo"), "states=foo"),
    ],
)
def test_an_optimizer_is_built_once(tmp_path, tiny_moe, words, message):
    asked = options(tmp_path, *words)
    model = model_on_meta(tiny_moe.config)
    with pytest.raises(UsageError, match=message):
        check_model(decide(asked, model, CPU, {}), model)


@pytest.mark.parametrize(
    ("optim", "read", "ignored"),
    [
        ("adamw_torch_fused", (), ("foo=1", "amsgrad=true", "bf16_stochastic_round=True")),
        ("sgd", ("momentum=0.9", "momentum=0.9,nesterov=true"), ("mumentum=0.9", "rank=8")),
        ("rmsprop", ("alpha=0.99", "centered=false"), ("alfa=0.9",)),
        ("adagrad", ("lr_decay=0.1",), ("momentum=0.9", "lr_decay=0.1,foo=1")),
        ("adafactor", ("bf16_stochastic_round=True",), ("scale_parameter=True",)),
        ("adamw_torch_8bit", ("block_size=256", "states=fp8"), ("blocksize=256",)),
    ],
)
def test_pairs_of_optim_args_that_nothing_reads(tmp_path, tiny_moe, optim, read, ignored):
    model = model_on_meta(tiny_moe.config)

    def check(pairs):
        asked = options(tmp_path, "--optim", optim, "--optim_args", pairs)
        check_model(decide(asked, model, CPU, {}), model)

    for pairs in read:
        check(pairs)
    for pairs in ignored:
        name = pairs.rpartition(",")[2].partition("=")[0]
        with pytest.raises(UsageError, match=f"--optim_args {name}=.*does not read {name}"):
            check(pairs)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"mlp_only_layers": [0, 1]}, "no layer has experts"),
        ({"output_router_logits": True}, "output_router_logits is True"),
        ({"use_sliding_window": True, "sliding_window": 16}, "attn_implementation='sdpa'"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"hidden_act": "gelu"}, "patch 'scatter_moe'"),
    ],
    ids=str,
)
def test_models_that_the_patches_refuse(tmp_path, tiny_moe, entries, words):
    config = type(tiny_moe.config)(**tiny_moe.config.to_dict() | entries)
    model = model_on_meta(config)
    with pytest.raises(ModelError, match=words):
        check_model(decide(options(tmp_path), model, CPU, {}), model)


@pytest.mark.parametrize(("length", "is_told"), [("2048", False), ("999999", True)])
def test_rows_beyond_the_positions_of_the_model(tmp_path, tiny_moe, caplog, length, is_told):
    model = model_on_meta(tiny_moe.config)
    assert model.config.max_position_embeddings >= 2048
    check_model(decide(options(tmp_path, "--max_length", length), model, CPU, {}), model)
    assert (f"--max_length {length}: the model was made for" in caplog.text) == is_told


# ---- disk ----


def disk_use(tmp_path, model, *words):
    decisions = decide(options(tmp_path, *words), model, CPU, {})
    return DiskUse.of(decisions.options, model, decisions.optimizer, decisions.weights)


def test_the_disk_is_counted(tmp_path, tiny_moe):
    model = model_on_meta(tiny_moe.config)
    elements = sum(math.prod(p.shape) for p in model.parameters())
    assert disk_use(tmp_path, model) == DiskUse(12 * elements, 3, 4 * elements)
    assert disk_use(tmp_path, model, "--save_only_model", "true").checkpoint == 4 * elements
    assert disk_use(tmp_path, model, "--save_strategy", "no").checkpoint == 0
    assert disk_use(tmp_path, model, "--export_dtype", "bfloat16").export == 2 * elements
    every = ("--save_total_limit", "0", "--max_steps", "10", "--save_steps", "3")
    assert disk_use(tmp_path, model, *every).most == 4
    assert disk_use(tmp_path, model, "--dtype", "bfloat16").checkpoint == 6 * elements


def test_a_disk_that_is_too_small_is_told_at_the_start(tmp_path, caplog):
    huge, gigabyte = 1 << 60, 10**9
    with pytest.raises(
        UsageError, match=r"GB are free; a checkpoint takes .* --save_total_limit 1"
    ):
        DiskUse(huge, 3, gigabyte).check(tmp_path / "a" / "run")
    with pytest.raises(UsageError, match="exported model takes"):
        DiskUse(0, 3, huge).check(tmp_path)
    DiskUse(1, 1 << 60, 1).check(tmp_path)
    assert "that may not be enough" in caplog.text
    caplog.clear()
    DiskUse(1, 3, 1).check(tmp_path)
    assert not caplog.text


def test_a_dry_run_of_a_recipe_for_gpus_says_so_and_goes_on(tmp_path):
    asked = options(tmp_path, "--use_cpu", "false", "--bf16", "true")
    lines = list(dry_run(asked, {}))
    assert any(line.startswith("not on this machine: --bf16 true") for line in lines)

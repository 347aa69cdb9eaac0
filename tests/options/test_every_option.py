"""Every option, fed a wrong type, a wrong value and nothing: an error that names it, at once."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import get_args, get_type_hints

import pytest
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import SchedulerType

from qwen3_sft.errors import UsageError
from qwen3_sft.options.data_args import DataArguments
from qwen3_sft.options.judged_options import JUDGED, REFUSED
from qwen3_sft.options.model_args import ModelArguments
from qwen3_sft.options.recipe import parse_options
from qwen3_sft.options.train_args import TrainArguments
from qwen3_sft.options.values import REPORTERS, RULES, SCHEDULES
from tests.support.source_tree import ROOT

KINDS = (ModelArguments, DataArguments, TrainArguments)
FIELDS = {f.name: f for kind in KINDS for f in dataclasses.fields(kind) if f.init}
TYPES = {name: hint for kind in KINDS for name, hint in get_type_hints(kind).items()}
LEAST = ["--model_name_or_path", "some/model", "--dataset", "rows.jsonl"]
SWITCHES = sorted(name for name in FIELDS if bool in (TYPES[name], *get_args(TYPES[name])))


def _kinds(name):
    return {TYPES[name], *get_args(TYPES[name])}


NUMBERS = sorted(name for name in FIELDS if {int, float} & _kinds(name) and name not in SWITCHES)
CHOSEN = sorted(
    name for name in FIELDS if str(TYPES[name]).startswith("typing.Literal")
)  # fmt: skip

# A value that a user might write, for each option that would be ignored or wrong.
REFUSED_VALUES = {
    "use_liger_kernel": "true", "label_smoothing_factor": "0.1", "auto_find_batch_size": "true",
    "dataloader_persistent_workers": "true", "dataloader_drop_last": "true",
    "remove_unused_columns": "true", "logging_nan_inf_filter": "true",
    "enable_jit_checkpoint": "true", "resume_from_checkpoint": "runs/a/checkpoint-1",
    "ddp_timeout": "60", "train_sampling_strategy": "group_by_length",
    "gradient_checkpointing": "true", "gradient_checkpointing_kwargs": '{"use_reentrant": true}',
    "activation_checkpointing_kwargs": '{"use_reentrant": true}',
    "torch_compile_backend": "eager", "torch_compile_mode": "max-autotune", "fsdp": "full_shard",
    "deepspeed": "ds.json", "average_tokens_across_devices": "false", "bf16_full_eval": "true",
    "fp16_full_eval": "true", "liger_kernel_config": '{"rope": true}', "use_cache": "true",
    "include_num_input_tokens_seen": "true", "disable_tqdm": "false",
    "prediction_loss_only": "true", "eval_do_concat_batches": "false",
    "eval_use_gather_object": "true", "eval_accumulation_steps": "4",
    "include_for_metrics": "inputs", "batch_eval_metrics": "true", "label_names": "labels",
    "save_on_each_node": "true", "greater_is_better": "true", "hub_strategy": "all_checkpoints",
    "hub_always_push": "true", "hub_revision": "dev", "data_seed": "3",
    "accelerator_config": '{"split_batches": true}', "parallelism_config": "tp",
    "dataloader_in_order": "false", "length_column_name": "tokens", "fsdp_config": "fsdp.json",
    "local_rank": "1", "debug": "underflow_overflow",
    "full_determinism": "true", "skip_memory_metrics": "false",
    "do_train": "true", "do_eval": "true", "do_predict": "true",
}  # fmt: skip


@pytest.fixture
def recipe(tmp_path):
    def write(text: str) -> list[str]:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return ["--config", str(path)]

    return write


# ---- the table of transformers' options ----


def test_every_option_of_transformers_is_judged():
    names = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    assert not names - JUDGED.keys(), "new: does it work here, is it ours, or is it refused?"
    assert not JUDGED.keys() - names, "gone from transformers"


def test_a_refused_option_says_what_to_do():
    for name, judged in JUDGED.items():
        assert judged.note or judged.verdict != "refused", name
        assert (judged.verdict == "refused") == bool(judged.fine), name


def test_every_refused_option_has_a_case():
    assert REFUSED_VALUES.keys() == REFUSED.keys(), "add the option and a value above"


@pytest.mark.parametrize("option", sorted(REFUSED))
def test_refused_options(option, recipe):
    value, sentence = REFUSED_VALUES[option], REFUSED[option].note
    with pytest.raises(UsageError, match=f"^--{option} ") as error:
        parse_options([*LEAST, f"--{option}", value])
    assert str(error.value).endswith(sentence)
    with pytest.raises(UsageError, match=rf"recipe\.yaml:2: --{option} ") as error:
        parse_options([*recipe(f"seed: 1\n{option}: {value}\n"), *LEAST])
    assert str(error.value).endswith(sentence)


def test_defaults_are_fine():
    parse_options(LEAST)


def test_tables_know_what_transformers_knows():
    assert set(SCHEDULES) == {schedule.value for schedule in SchedulerType}
    assert set(REPORTERS) == {*INTEGRATION_TO_CALLBACK, "none", "all"}


# ---- wrong types, wrong values, nothing ----


def without(option: str) -> list[str]:
    """The least options but one."""
    return [word for i in (0, 2) if LEAST[i] != f"--{option}" for word in LEAST[i : i + 2]]


def named(option: str) -> str:
    return rf"(^|: |\s)(argument )?--{option}\b"


@pytest.mark.parametrize("option", sorted(FIELDS))
def test_a_wrong_type(option, recipe):
    """A word for a number, a switch or a choice; a mapping for everything else."""
    if option in {*NUMBERS, *SWITCHES, *CHOSEN}:
        with pytest.raises(UsageError, match=named(option)):
            parse_options([*LEAST, f"--{option}", "what"])
    wrong = "what" if "dict" in str(TYPES[option]) else "{a: {b: 1}}"
    with pytest.raises(UsageError, match=rf"recipe\.yaml:1: .*--{option}\b"):
        parse_options([*recipe(f"{option}: {wrong}\n"), *LEAST])


@pytest.mark.parametrize("option", sorted({*FIELDS} - {"model_name_or_path"}))
def test_an_empty_value(option, recipe):
    with pytest.raises(UsageError, match=named(option)):
        parse_options([*LEAST, f"--{option}="])
    if option not in ("fsdp", "debug"):
        with pytest.raises(UsageError, match=rf"recipe\.yaml:1: .*--{option}\b"):
            parse_options([*recipe(f"{option}: ''\n"), *without(option)])


def test_every_number_has_a_rule():
    assert not set(NUMBERS) - RULES.keys() - REFUSED.keys(), "add a rule to options/values.py"
    assert not RULES.keys() - FIELDS.keys()


@pytest.mark.parametrize(
    ("option", "value"), [(name, value) for name, rule in RULES.items() for value in rule.wrong]
)
def test_a_wrong_value(option, value, recipe):
    with pytest.raises(UsageError, match=named(option)):
        parse_options([*LEAST, f"--{option}={value}"])
    with pytest.raises(UsageError, match=rf"recipe\.yaml:1: .*--{option}\b"):
        parse_options([*recipe(f"{option}: '{value}'\n"), *LEAST])


@pytest.mark.parametrize("option", [name for name in NUMBERS if float not in _kinds(name)])
def test_a_count_that_no_counter_holds(option):
    with pytest.raises(UsageError, match=named(option)):
        parse_options([*LEAST, f"--{option}={10**20}"])


@pytest.mark.parametrize(
    "words",
    [
        "gradient_accumulation_steps 0", "seed -1", "adam_epsilon -1", "adam_beta1 2",
        "learning_rate nan", "learning_rate -0.1", "dataloader_num_workers -1",
        "weight_decay -0.1", "max_grad_norm -1", "logging_steps -2",
        "per_device_train_batch_size 0", "per_device_eval_batch_size 0", "num_train_epochs 0",
        "num_train_epochs -1", "max_steps 0", "save_steps 0", "eval_steps -1", "warmup_steps -1",
        "lr_scheduler_type cosin", "metric_for_best_model accuracy", "deepspeed ds.json",
        "gradient_checkpointing true", "report_to wandbb", "optim adam",
    ],
)  # fmt: skip
def test_seen(words):
    option, value = words.split()
    with pytest.raises(UsageError, match=rf"(?i)--{option}\b.*{value}"):
        parse_options([*LEAST, f"--{option}", value])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--dataloader_prefetch_factor 2", "--dataloader_prefetch_factor 2: .*num_workers"),
        ("--dataloader_multiprocessing_context spawn", "multiprocessing_context .*num_workers"),
        ("--optim_target_modules all-linear", "--optim_target_modules .*galore"),
        ("--hub_model_id me/mine", "--hub_model_id me/mine: .*--push_to_hub"),
        ("--push_to_hub true --hub_model_id a/b/c", "--hub_model_id a/b/c: not a name"),
        ("--push_to_hub true --output_dir runs/#1", "--hub_model_id #1: not a name"),
        ("--trackio_space_id a/b", "--trackio_space_id a/b: .*--report_to trackio"),
        ("--fp16 true --bf16 true", "--fp16 and --bf16"),
        ('--lr_scheduler_kwargs {"bogus":1}', "--lr_scheduler_kwargs .*bogus"),
        ("--lr_scheduler_type cosine_with_min_lr", "cosine_with_min_lr .*min_lr"),
        ("--lr_scheduler_type warmup_stable_decay", "warmup_stable_decay .*decay"),
    ],
)  # fmt: skip
def test_what_does_not_go_together(words, message):
    with pytest.raises(UsageError, match=message):
        parse_options([*LEAST, *words.split()])


@pytest.mark.parametrize(
    "words",
    [
        "--max_steps 5 --num_train_epochs 0", "--learning_rate 0 --max_grad_norm 0",
        "--lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs {\"min_lr\":1e-6}",
        "--save_total_limit 0 --warmup_steps 0.03", "--report_to wandb tensorboard",
        "--push_to_hub true --hub_model_id me/mine", "--optim_args rank=8,scale=0.5",
        "--metric_for_best_model eval_loss --greater_is_better false",
        "--dataloader_num_workers 2 --dataloader_prefetch_factor 2",
    ],
)  # fmt: skip
def test_what_does(words):
    parse_options([*LEAST, *words.split()])


# ---- one real command line ----


@pytest.mark.parametrize("words", ["--adam_beta1 2", "--config latin.yaml"])
def test_the_command_ends_with_2_and_no_traceback(words, tmp_path):
    (tmp_path / "latin.yaml").write_bytes("run_name: Ä\n".encode("latin-1"))
    command = [sys.executable, "-m", "qwen3_sft.cli", "data", "inspect", *LEAST, *words.split()]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert words.split()[0] in done.stderr

"""What people write who come from other trainers, and names like nothing here."""

from __future__ import annotations

import re

import pytest

from qwen3_sft.errors import UsageError
from qwen3_sft.options.known_elsewhere import SAME, TOLD
from qwen3_sft.options.recipe import parse_options
from tests.options.test_every_option import FIELDS

LEAST = ["--model_name_or_path", "some/model", "--dataset", "rows.jsonl"]


def test_no_name_of_ours_is_in_the_tables():
    assert not {*SAME, *TOLD} & FIELDS.keys()
    assert not SAME.keys() & TOLD.keys()
    assert {name.split()[0] for name in SAME.values()} <= FIELDS.keys()


def test_options_in_sentences_exist():
    for sentence in TOLD.values():
        for name in re.findall(r"--(\w+)", sentence):
            assert name in FIELDS or name == "config_file", sentence


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("lora_r", "LoRA is not supported"), ("use_peft", "LoRA is not supported"),
        ("load_in_4bit", "not quantised"), ("max_seq_length", r"--max_length\?"),
        ("flash_attn", "--attn_implementation"), ("stage", "all weights are trained"),
        ("finetuning_type", "all weights are trained"), ("template", "--chat_format"),
        ("cutoff_len", r"--max_length\?"), ("sequence_len", r"--max_length\?"),
        ("micro_batch_size", r"--per_device_train_batch_size\?"),
        ("sample_packing", r"--packing\?"), ("dataset_text_field", "--dataset_format text"),
        ("completion_only_loss", "--train_on assistant"), ("warmup_ratio", "--warmup_steps"),
        ("assistant_only_loss", "--train_on assistant"), ("logging_dir", "TENSORBOARD_LOGGING_DIR"),
        ("evaluation_strategy", r"--eval_strategy\?"), ("base_model", r"--model_name_or_path\?"),
    ],
)  # fmt: skip
def test_each_gets_a_sentence(name, said):
    with pytest.raises(UsageError, match=rf"^unknown option --{name} on the command line.*{said}"):
        parse_options([*LEAST, f"--{name}", "1"])


@pytest.mark.parametrize("name", ["foo", "xyzzy", "lora_qv_only", "min_p", "teacher"])
def test_what_is_like_nothing_gets_no_suggestion(name):
    with pytest.raises(UsageError, match=rf"^unknown option --{name} on .*; --help lists all$"):
        parse_options([*LEAST, f"--{name}", "1"])

import dataclasses
from collections import Counter

import pytest

from qwen3_sft.options.changes import OPTIONS, comparable, length
from qwen3_sft.options.data_args import DataArguments
from qwen3_sft.options.draft import FIELDS
from qwen3_sft.options.judged_options import REFUSED
from qwen3_sft.options.model_args import ModelArguments
from qwen3_sft.options.recipe import parse_options

WORDS = ["--model_name_or_path", "m", "--dataset", "d"]


def test_what_a_change_means_is_judged_for_every_option_once():
    names = Counter(name for names in OPTIONS.values() for name in names)
    fields = {f.name for kind in (ModelArguments, DataArguments) for f in dataclasses.fields(kind)}
    assert names == Counter({*fields, *FIELDS} - REFUSED.keys())


def test_what_is_compared_is_json_without_secrets():
    options = parse_options([*WORDS, "--hub_token", "hf_secret", "--optim", "adafactor"])
    values = comparable(options.values())
    assert "hf_secret" not in str(values)
    assert values["optim"] == "adafactor"
    assert values["dataset"] == ["d"]
    assert "logging_steps" not in values


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], {"max_steps": -1, "num_train_epochs": 1.0}),
        (["--num_train_epochs", "3"], {"max_steps": -1, "num_train_epochs": 3.0}),
        (["--max_steps", "7"], {"max_steps": 7, "num_train_epochs": None}),
        (["--max_steps", "7", "--num_train_epochs", "3"],
         {"max_steps": 7, "num_train_epochs": None}),
    ],
)  # fmt: skip
def test_steps_win_over_epochs(words, expected):
    assert length(parse_options([*WORDS, *words]).values()) == expected

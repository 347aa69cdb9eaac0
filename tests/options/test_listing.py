"""listing.json is what HfArgumentParser makes of the dataclasses, and reads words as that does.

`python -m tests.options.test_listing` rewrites it.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from argparse import ArgumentTypeError
from typing import Any, get_args, get_type_hints

import pytest
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from qwen3_sft.errors import UsageError
from qwen3_sft.options.command_line import read_options
from qwen3_sft.options.data_args import DataArguments
from qwen3_sft.options.listing import FILE, Listed, listing
from qwen3_sft.options.model_args import ModelArguments
from qwen3_sft.options.train_args import TrainArguments

KINDS = (ModelArguments, DataArguments, TrainArguments)
LEAST = ["--model_name_or_path", "some/model", "--dataset", "rows.jsonl"]


def entries() -> dict[str, dict[str, Any]]:
    parser = HfArgumentParser(list(KINDS), allow_abbrev=False, add_help=False)
    hints = {name: hint for kind in KINDS for name, hint in get_type_hints(kind).items()}
    ours = {name for kind in KINDS for name in inspect.get_annotations(kind)}
    actions = [action for action in parser._actions if action.nargs != 0]  # not --no_...
    return {a.dest: entry(a, hints[a.dest], is_ours=a.dest in ours) for a in actions}


def entry(action: Any, hint: Any, *, is_ours: bool) -> dict[str, Any]:
    """What differs from the defaults of `Listed`."""
    kinds = {int: "int", float: "float", string_to_bool: "switch"}
    found = {
        "kind": kinds.get(action.type, "str"),
        "default": getattr(action.default, "value", action.default),
        "help": " ".join((action.help or "").split()),
        "choices": [str(choice) for choice in action.choices or ()],
        "nargs": action.nargs,
        "nullable": type(None) in get_args(hint),
        "is_mapping": "dict" in str(hint),
        "is_ours": is_ours,
    }
    unset = {f.name: f.default for f in dataclasses.fields(Listed)} | {"choices": []}
    return {key: value for key, value in found.items() if value != unset[key]}


def written() -> str:
    lines = (f" {json.dumps(name)}: {json.dumps(value)}" for name, value in entries().items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def test_the_file_is_what_the_dataclasses_say():
    assert FILE.read_text(encoding="utf-8") == written(), (
        "options have changed: run `python -m tests.options.test_listing`"
    )


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--packing", "no", "--bf16", "--use-liger", "T", "--max-length=64", "--lr_scheduler_type",
         "linear", "--eval_dataset", "a", "b", "--learning_rate", "1e-4", "--fp8", "all"],
        ["--no_packing", "--no-dataloader-pin-memory", "--save_strategy", "no", "--resume", "x"],
    ],
)  # fmt: skip
def test_words_are_read_as_hf_argument_parser_reads_them(words):
    parser = HfArgumentParser(list(KINDS), allow_abbrev=False, add_help=False)
    expected = vars(parser.parse_args([*LEAST, *words]))
    found = read_options([*LEAST, *words]).values
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        plain = getattr(value, "value", value)  # of an enumeration
        assert (found[name], type(found[name])) == (plain, type(plain)), name


@pytest.mark.parametrize("word", ["yes", "TRUE", "t", "1", "No", "false", "F", "0", "off", "2"])
def test_a_switch(word):
    try:
        expected = string_to_bool(word)
    except ArgumentTypeError:
        with pytest.raises(UsageError, match=f"--packing.*'{word}' is neither true nor false"):
            read_options([*LEAST, "--packing", word])
    else:
        assert read_options([*LEAST, "--packing", word]).values["packing"] is expected


def test_the_dataclasses_have_every_option():
    names = [f.name for kind in KINDS for f in dataclasses.fields(kind) if f.init]
    assert sorted(names) == sorted(listing())


if __name__ == "__main__":
    FILE.write_text(written(), encoding="utf-8")

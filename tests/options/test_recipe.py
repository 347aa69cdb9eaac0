"""A recipe plus a command line: what is understood, what wins, and what is refused by name."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

import pytest
import yaml

from qwen3_sft.errors import UsageError
from qwen3_sft.options.data_args import DataArguments
from qwen3_sft.options.model_args import ModelArguments
from qwen3_sft.options.recipe import Options, parse_options
from qwen3_sft.options.train_args import TrainArguments

LEAST = ["--model_name_or_path", "some/model", "--dataset", "rows.jsonl"]


@pytest.fixture
def recipe(tmp_path):
    """Write a recipe from its text and return the path as the command line takes it."""

    def write(text: str) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def everything(options: Options) -> dict[str, object]:
    return options.values()


def test_defaults_are_those_of_the_dataclasses():
    values = everything(parse_options(LEAST))
    for kind in (ModelArguments, DataArguments, TrainArguments):
        for field in (f for f in dataclasses.fields(kind) if f.init):
            is_ours = field.name in inspect.get_annotations(kind)
            if is_ours and field.name not in ("model_name_or_path", "dataset"):
                has_value = field.default is not dataclasses.MISSING
                default = field.default if has_value else field.default_factory()
                assert values[field.name] == default, field.name


def test_no_option_is_defined_twice():
    names = [
        f.name
        for k in (ModelArguments, DataArguments, TrainArguments)
        for f in dataclasses.fields(k)
    ]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize(
    ("written", "nearest"),
    [
        ("max_lenght", "max_length"),
        ("learning_rat", "learning_rate"),
        ("modle", "model_name_or_path"),
        ("grad_accum_steps", "gradient_accumulation_steps"),
        ("datasets", "dataset"),
        ("epochs", "num_train_epochs"),
        ("experts_impl", "experts_implementation"),
    ],
)
def test_unknown_option_names_the_nearest(recipe, written, nearest):
    path = recipe(f"{written}: 1\n")
    with pytest.raises(UsageError, match=f"--{written} in .*recipe.yaml.*--{nearest}\\?"):
        parse_options(["--config", path, *LEAST])
    with pytest.raises(UsageError, match=f"--{written} on the command line.*--{nearest}\\?"):
        parse_options([*LEAST, f"--{written}", "1"])


def test_unknown_option_written_with_dashes_and_equals_sign():
    with pytest.raises(UsageError, match=r"--max_lenght .*--max_length\?"):
        parse_options([*LEAST, "--max-lenght=8"])


def test_abbreviations_are_not_taken():
    """`--max_len` would silently change its meaning the day --max_lengths exists."""
    with pytest.raises(UsageError, match=r"--max_len .*--max_length\?"):
        parse_options([*LEAST, "--max_len", "64"])


def test_dashes_are_as_good_as_underscores():
    assert parse_options([*LEAST, "--max-length", "64"]).data.max_length == 64


def test_a_stray_word_is_named():
    with pytest.raises(UsageError, match="unexpected value 'extra' on the command line"):
        parse_options(["extra", *LEAST])


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_length", "long"),
        ("max_length", "1.5"),
        ("learning_rate", "fast"),
        ("packing", "perhaps"),
        ("overlong", "cut"),
        ("train_on", "user"),
        ("thinking", "always"),
        ("chat_format", "llama"),
        ("experts_implementation", "fastest"),
        ("attn_implementation", "flash"),
        ("dtype", "int8"),
    ],
)
def test_wrong_types_and_choices(recipe, option, value):
    """The message names the option and the value, wherever it was written."""
    named = rf"--{option}.*{value}|{value}.*--{option}"
    with pytest.raises(UsageError, match=named):
        parse_options([*LEAST, f"--{option}", value])
    with pytest.raises(UsageError, match=named):
        parse_options(["--config", recipe(f"{option}: {value}\n"), *LEAST])


def test_command_line_wins(recipe):
    path = recipe("max_length: 64\npacking: false\ndataset: [a.jsonl, b.jsonl]\nseed: 3\n")
    options = parse_options(
        ["--max_length", "128", "--packing", "true", *LEAST, "--config", path]
    )  # wherever --config stands
    assert (options.data.max_length, options.data.packing) == (128, True)
    assert options.data.dataset == ["rows.jsonl"], "a list is replaced, not extended"
    assert options.train.seed == 3
    assert options.recipe == path


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("learning_rate: 1e-5", "learning_rate", 1e-5),  # YAML reads this one as a string
        ("learning_rate: 1.0e-5", "learning_rate", 1e-5),
        ("learning_rate: 2", "learning_rate", 2.0),
        ("num_train_epochs: 0.5", "num_train_epochs", 0.5),
        ("max_steps: -1", "max_steps", -1),
        ("packing: no", "packing", False),
        ("packing: False", "packing", False),
        ("bf16: true", "bf16", True),
        ("eval_dataset: [a, b c]", "eval_dataset", ["a", "b c"]),
        ("eval_dataset: one.jsonl", "eval_dataset", ["one.jsonl"]),
        ("eval_dataset: []", "eval_dataset", []),
        ("num_proc: null", "num_proc", None),
        ("num_proc:", "num_proc", None),
        ("use_liger: false", "use_liger", False),
        ("output_dir: 'runs/a folder'", "output_dir", "runs/a folder"),
        ("run_name: Äpfel", "run_name", "Äpfel"),
        ("lr_scheduler_kwargs: {num_cycles: 2}", "lr_scheduler_kwargs", {"num_cycles": 2}),
        ("eval_steps: 0.25", "eval_steps", 0.25),
    ],
)
def test_values_of_a_recipe(recipe, line, name, value):
    options = parse_options(["--config", recipe(line + "\n"), *LEAST])
    found = everything(options)[name]
    if name == "lr_scheduler_kwargs":  # transformers parses the JSON later
        found = options.train.arguments().lr_scheduler_kwargs
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n", "{}\n"])
def test_empty_recipe_is_no_options(recipe, text):
    options = parse_options(["--config", recipe(text), *LEAST])
    assert everything(options) == everything(parse_options(LEAST))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1,\n", r"recipe\.yaml: not valid YAML"),
        ("a: b: c\n", r"recipe\.yaml: not valid YAML"),
        ("- a\n- b\n", r"recipe\.yaml: expected `key: value` lines, found a list"),
        ("just words\n", r"expected `key: value` lines, found a str"),
        ("!!python/object/apply:os.getcwd []\n", "not valid YAML"),
    ],
)
def test_not_a_recipe(recipe, text, message):
    with pytest.raises(UsageError, match=message):
        parse_options(["--config", recipe(text), *LEAST])


def test_missing_recipe(tmp_path):
    with pytest.raises(UsageError, match=r"--config .*none\.yaml: no such file"):
        parse_options(["--config", str(tmp_path / "none.yaml")])
    with pytest.raises(UsageError, match="--config: expected one argument"):
        parse_options(["--config"])


def test_model_and_data_are_required():
    with pytest.raises(UsageError, match="no model: set --model_name_or_path"):
        parse_options(LEAST[2:])
    with pytest.raises(UsageError, match="no data: set --dataset"):
        parse_options(LEAST[:2])


def test_two_sources_of_evaluation():
    with pytest.raises(UsageError, match=r"--eval_fraction and --eval_dataset .*choose one"):
        parse_options([*LEAST, "--eval_fraction", "0.1", "--eval_dataset", "e.jsonl"])


@pytest.mark.parametrize("value", ["-0.1", "0.6", "nan"])
def test_eval_fraction_bounds(value):
    with pytest.raises(UsageError, match=f"--eval_fraction {value}: must be 0 to 0.5"):
        parse_options([*LEAST, "--eval_fraction", value])


@pytest.mark.parametrize(("length", "is_fine"), [(-1, False), (0, False), (7, False), (8, True)])
def test_max_length_bounds(length, is_fine):
    argv = [*LEAST, "--max_length", str(length)]
    if is_fine:
        assert parse_options(argv).data.max_length == length
        return
    with pytest.raises(UsageError, match=f"--max_length {length}: must be at least 8"):
        parse_options(argv)


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--dataset", "a.jsonl", "b c.jsonl", "--packing", "false", "--max_length", "64"],
        ["--learning_rate", "1e-5", "--lr_scheduler_kwargs", '{"num_cycles": 2}', "--seed", "7"],
        ["--eval_dataset", "e.jsonl", "--overlong", "truncate", "--use_liger", "false"],
        ["--report_to", "tensorboard", "--max_steps", "-1", "--eval_steps", "0.1"],
        ["--dtype", "bfloat16", "--bf16", "true", "--save_total_limit", "5"],
        ["--warmup_steps", "0.03", "--router_aux_loss_coef", "0", "--resume", "never"],
        ["--run_name", "yes", "--output_dir", "runs/1e5", "--dataset_config", "null"],
    ],
    ids=" ".join,
)
def test_resolved_options_run_again(recipe, argv):
    """`config.yaml` of a run folder is a recipe of the same run."""
    options = parse_options([*LEAST, *argv])
    written = yaml.safe_dump(options.resolved(), sort_keys=False, allow_unicode=True)
    again = parse_options(["--config", recipe(written)])
    assert everything(again) == everything(options)


def test_a_dry_run_is_not_part_of_the_recipe():
    assert "dry_run" not in parse_options([*LEAST, "--dry_run", "true"]).resolved()


def test_output_dir():
    assert parse_options([*LEAST, "--output_dir", "a/b"]).output_dir == Path("a/b")

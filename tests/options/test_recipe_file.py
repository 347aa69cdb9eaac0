"""What YAML makes of a recipe, which file is none, and who is blamed for a mistake."""

from __future__ import annotations

import os

import pytest

from qwen3_sft.errors import UsageError
from qwen3_sft.options.recipe import parse_options

LEAST = ["--model_name_or_path", "some/model", "--dataset", "rows.jsonl"]


def parsed(tmp_path, text: str | bytes, *words: str):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return parse_options(["--config", str(path), *LEAST, *words])


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("fp8: off", "fp8", "off"),
        ("eval_strategy: no", "eval_strategy", "no"),
        ("save_strategy: no", "save_strategy", "no"),
        ("logging_strategy: NO", "logging_strategy", None),
        ("activation_checkpointing: none", "activation_checkpointing", "none"),
        ("packing: off", "packing", False),
        ("bf16: on", "bf16", True),
        ("run_name: yes", "run_name", "yes"),
        ("run_name: 12:30:00", "run_name", "12:30:00"),  # YAML: 45000
        ("run_name: 1e5", "run_name", "1e5"),
        ("run_name: 2026-01-02", "run_name", "2026-01-02"),
        ("model_revision: 0123456", "model_revision", "0123456"),  # YAML: 42798
        ("eval_dataset: [on, 0123]", "eval_dataset", ["on", "0123"]),
        ("max_steps: 1_000", "max_steps", 1000),
        ("seed: 0x10", "seed", 16),
        ("<<: {seed: 3, max_steps: 5}\nseed: 4", "seed", 4),
        ("dataset-split: test", "dataset_split", "test"),
    ],
)
def test_words_are_taken_as_written(tmp_path, line, name, value):
    if value is None:
        with pytest.raises(UsageError, match=rf"recipe\.yaml:1: .*--{name}\b"):
            parsed(tmp_path, line)
        return
    found = parsed(tmp_path, line).values()[name]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\n\nmax_length: long\n", r"recipe\.yaml:3: .*--max_length.*'long'"),
        ("seed: 1\nseed: 2\n", "'seed' stands twice"),
        ("max-length: 64\nmax_length: 64\n", r"recipe\.yaml:2: max_length stands twice"),
        ("seed: 1\nmax_length: 7\n", r"recipe\.yaml:2: --max_length 7: must be at least 8"),
        ("seed: 1\npacking:\n", r"recipe\.yaml:2: packing cannot be null"),
        ("seed: 1\nmax_lenght: 8\n", r"--max_lenght in .*recipe\.yaml:2; did you mean"),
        ("output_dir: [a, b]\n", r"recipe\.yaml:1: --output_dir .*not a list"),
        ("output_dir: {a: b}\n", r"recipe\.yaml:1: --output_dir .*not a mapping"),
        ("eval_dataset: [a, [b]]\n", r"recipe\.yaml:1: eval_dataset: every entry"),
        ("eval_dataset: [a, -b]\n", r"recipe\.yaml:1: --eval_dataset has the entry '-b'"),
        ("lr_scheduler_kwargs: {a: 2026-01-02}\n", r"recipe\.yaml:1: lr_scheduler_kwargs: "),
        ("run_name: 2026-13-45\n", "recipe.yaml: not valid YAML"),
        ("output_dir: $NOT_SET_HERE\n", r"recipe\.yaml:1: --output_dir \$NOT_SET_HERE"),
        ("run_name: Ä\n".encode("latin-1"), r"--config .*recipe\.yaml: not UTF-8"),
        ("seed: 1\n".encode("utf-16"), r"--config .*recipe\.yaml: not UTF-8"),
        ("seed: 1\n".encode("utf-16-le"), r"recipe\.yaml: not valid YAML"),
        (b"seed: 1\0\n", r"recipe\.yaml: not valid YAML"),
    ],
)
def test_the_line_is_blamed(tmp_path, text, message):
    with pytest.raises(UsageError, match=message):
        parsed(tmp_path, text)


def test_the_command_line_is_blamed_for_its_own(tmp_path):
    with pytest.raises(UsageError, match=r"^--seed -1: must be"):
        parsed(tmp_path, "seed: 1\n", "--seed", "-1")
    assert parsed(tmp_path, "seed: -1\n", "--seed", "2").train.seed == 2, "it wins"


def test_a_byte_order_mark_is_no_content(tmp_path):
    assert parsed(tmp_path, "seed: 3\n".encode("utf-8-sig")).train.seed == 3


def test_what_cannot_be_read(tmp_path):
    for path in (tmp_path, tmp_path / ("x" * 300)):
        with pytest.raises(UsageError, match=r"--config .*: cannot be read: "):
            parse_options(["--config", str(path), *LEAST])
    locked = tmp_path / "locked.yaml"
    locked.write_text("seed: 1\n")
    locked.chmod(0)
    if os.geteuid():  # root reads everything
        with pytest.raises(UsageError, match=r"--config .*: cannot be read: Permission denied"):
            parse_options(["--config", str(locked), *LEAST])

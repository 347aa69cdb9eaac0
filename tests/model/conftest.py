"""A tiny base model on disk, made once and copied for each test that breaks it."""

import json
import shutil

import pytest

from qwen3_sft.demo.model import tiny_config, tiny_model
from qwen3_sft.logs import progress_bars


@pytest.fixture(scope="session")
def whole_base(tokenizer, tmp_path_factory):
    """A Qwen3-MoE of 2 layers with 4 experts, and its tokenizer; not to be changed."""
    folder = tmp_path_factory.mktemp("whole") / "base"
    config = tiny_config(
        len(tokenizer), num_hidden_layers=2, num_experts=4, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with progress_bars(0):
        tiny_model(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def base(whole_base, tmp_path):
    """A copy of it."""
    return shutil.copytree(whole_base, tmp_path / "base")


@pytest.fixture
def change():
    """Write entries into a JSON file of a folder; None takes one out."""

    def write(folder, file="config.json", **entries):
        content = json.loads((folder / file).read_text()) | entries
        kept = {key: value for key, value in content.items() if value is not None}
        (folder / file).write_text(json.dumps(kept))

    return write

"""The export on the hub: exactly the verified folder, private, nothing secret, no run lost."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError

from qwen3_sft.errors import UploadError, UsageError
from qwen3_sft.export.card import model_card
from qwen3_sft.export.upload import check_token, upload_model
from qwen3_sft.options.recipe import parse_options
from qwen3_sft.options.train_args import TrainArguments
from qwen3_sft.run import run_command
from tests.support.data_rows import sums

TOKEN = "hf_" + "s3cret" * 5
LEAST = ["--model_name_or_path", "Qwen/Qwen3-30B-A3B", "--dataset", "org/data:train", "own.jsonl"]


@dataclass
class Hub:
    """A server that remembers what it was asked for."""

    there: dict[str, bool] = field(default_factory=dict)  # repositories: whether they are private
    files: dict[str, list[str]] = field(default_factory=dict)
    error: Exception | None = None

    def create_repo(self, name, *, private, exist_ok):
        full = name if "/" in name else f"me/{name}"
        assert exist_ok
        self.there.setdefault(full, private)
        return SimpleNamespace(repo_id=full)

    def model_info(self, name):
        return SimpleNamespace(private=self.there[name])

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        if self.error is not None:
            raise self.error
        self.files[repo_id] = sorted(path.name for path in Path(folder_path).iterdir())


def options(*words):
    return parse_options([*LEAST, "--push_to_hub", "true", *words])


@pytest.fixture
def model(tmp_path):
    """A run folder with what must not be sent beside what must."""
    folder = tmp_path / "mine" / "model"
    folder.mkdir(parents=True)
    for name in ("config.json", "README.md", "model.safetensors", "../samples.jsonl"):
        (folder / name).write_text("{}")
    return folder


def test_exactly_the_export_is_sent_and_private(model):
    hub = Hub()
    upload_model(options("--output_dir", "runs/mine").train, model, hub)
    assert hub.files == {"me/mine": ["README.md", "config.json", "model.safetensors"]}
    assert hub.there == {"me/mine": True}


def test_public_only_if_asked(model):
    hub = Hub()
    words = ("--hub_private_repo", "false", "--hub_model_id", "org/shown")
    upload_model(options(*words).train, model, hub)
    assert hub.there == {"org/shown": False}


def test_a_repository_that_is_public_already_gets_nothing(model):
    hub = Hub(there={"me/mine": False})
    with pytest.raises(UploadError, match="it is public; --hub_private_repo false"):
        upload_model(options("--hub_model_id", "mine").train, model, hub)
    assert not hub.files


@pytest.mark.parametrize("error", [ConnectionError, PermissionError, HFValidationError])
def test_a_failure_tells_how_to_send_it(model, error):
    hub = Hub(error=error(f"no: Bearer {TOKEN}"))
    train = options("--hub_model_id", "org/mine", "--hub_token", TOKEN).train
    with pytest.raises(UploadError) as failed:
        upload_model(train, model, hub)
    assert f"hf upload org/mine {model} --private" in str(failed.value)
    assert TOKEN not in str(failed.value)


def test_no_token_is_found_out_before_training(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UsageError, match="--push_to_hub true: no token"):
        check_token(options().train)
    check_token(options("--hub_token", TOKEN).train)
    check_token(parse_options(LEAST).train)


def test_upstream_never_sends(tmp_path):
    args = TrainArguments(output_dir=str(tmp_path), use_cpu=True, push_to_hub=True, hub_token=TOKEN)
    assert (args.push_to_hub, args.hub_token) == (False, None)


def test_the_card_names_the_hub_and_nothing_private(tmp_path):
    words = ("--output_dir", str(tmp_path), "--run_name", "private", "--hub_token", TOKEN)
    card = model_card(options(*words), {"qwen3-sft": "0.1"})
    head = yaml.safe_load(card.split("---")[1])
    assert (head["base_model"], head["datasets"]) == ("Qwen/Qwen3-30B-A3B", ["org/data"])
    assert "| learning_rate | 1e-05 |" in card
    assert "| optim | adamw_torch_fused |" in card
    for secret in (TOKEN, str(tmp_path), "own.jsonl", "private"):
        assert secret not in card


def test_a_run_without_network_keeps_its_model(tiny_moe, tokenizer, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    base = tmp_path / "base"
    tiny_moe.save_pretrained(base)
    tokenizer.save_pretrained(base)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, sums(8))))
    words = [
        "--model_name_or_path", base, "--dataset", tmp_path / "rows.jsonl", "--data_cache_dir",
        tmp_path / "cache", "--max_length", 64, "--max_steps", 1, "--save_steps", 1, "--use_cpu",
        "true", "--output_dir", tmp_path / "run", "--push_to_hub", "true", "--hub_token", TOKEN,
    ]  # fmt: skip
    assert run_command(list(map(str, words))) == 1
    assert f"its verified model is {tmp_path}/run/model: hf upload run " in caplog.text
    assert (tmp_path / "run" / "summary.json").is_file()
    assert (tmp_path / "run" / "model" / "README.md").read_text().startswith("---\n")
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert "training_args.bin" not in {path.name for path in files}
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["push_to_hub"] is True

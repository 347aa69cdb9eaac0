import json
import shutil

import pytest
import torch
from huggingface_hub import constants

from qwen3_sft.errors import ModelError
from qwen3_sft.model.loading import load_model, load_strict, load_tokenizer, resolve_model
from qwen3_sft.options.model_args import ModelArguments

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_a_folder_is_resolved_and_loads(base):
    assert resolve_model(str(base)) == base
    assert len(load_tokenizer(base)) == 1024
    model = load_model(base, ModelArguments(), CPU, torch.bfloat16, "torch_varlen")
    assert model.dtype == torch.bfloat16
    assert model.config.use_cache is False


@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm", "eager"])
def test_experts_implementation_reaches_the_config(base, experts):
    options = ModelArguments(experts_implementation=experts)
    model = load_model(base, options, CPU, torch.float32, "eager")
    assert model.config._experts_implementation == experts
    assert model.config._attn_implementation == "eager"


def test_wrong_models_are_named(base, tmp_path, monkeypatch):
    with pytest.raises(ModelError, match="no such folder"):
        resolve_model(str(tmp_path / "absent"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"no config\.json"):
        resolve_model(str(tmp_path / "empty"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    with pytest.raises(ModelError, match="'llama'"):
        resolve_model(str(base))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="neither a folder nor a hub model"):
        resolve_model("nobody/nothing")


def test_missing_weights_are_named(base):
    index = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(index | {"num_hidden_layers": 5}))
    with pytest.raises(ModelError, match=r"missing: model\.layers\.[234]\."):
        load_strict(base)


def test_liger_needs_a_gpu(base):
    with pytest.raises(ModelError, match="--use_liger"):
        load_model(base, ModelArguments(use_liger=True), CPU, torch.float32, "sdpa")


@pytest.fixture
def hub(base, tmp_path, monkeypatch):
    """A hub that nobody answers for, and its cache with one model in it."""
    model = tmp_path / "hub" / "models--me--tiny"
    shutil.copytree(base, model / "snapshots" / "abc")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    return model


@pytest.mark.parametrize("is_offline", [True, False])
def test_a_hub_id_without_a_network(hub, monkeypatch, is_offline):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", is_offline)
    assert resolve_model("me/tiny") == hub / "snapshots" / "abc"
    for name, revision in (("me/other", None), ("me/tiny", "v9")):
        with pytest.raises(ModelError, match=f"{name}: neither a folder nor a hub model") as told:
            resolve_model(name, revision)
        assert "\n" not in str(told.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_of_a_model_is_told(base, name):
    with pytest.raises(ModelError, match=f"{name}: a file; name the folder"):
        resolve_model(str(base / name))

"""Configurations known offline: released sizes, built without network or memory."""

from __future__ import annotations

import pytest
from torch import nn

from qwen3_sft.families.family import families
from qwen3_sft.families.flops import num_parameters
from qwen3_sft.model.meta_model import known_config, model_on_meta

# 30.5 and 235 billion by the models' names and cards; 538,631,408 is what TorchTitan's published
# FLOPs of Qwen3-VL-30B-A3B imply for its vision tower.
RELEASED = {
    "Qwen3-30B-A3B": 30_532_122_624,
    "Qwen3-Coder-30B-A3B": 30_532_122_624,
    "Qwen3-235B-A22B": 235_093_634_560,
    "Qwen3-VL-30B-A3B": 30_532_122_624 + 538_631_408,
}
KNOWN = [name for known in families() for name in known.known_configs]
ACTIVE = {"Qwen3-30B-A3B": 3.35e9, "Qwen3-235B-A22B": 22.2e9}


@pytest.mark.parametrize("name", KNOWN)
def test_parameters_are_those_released(name):
    (size,) = (n for family, n in RELEASED.items() if name.split("/")[1].startswith(family))
    model = model_on_meta(known_config(name))
    parameters = list(model.parameters())
    assert sum(p.numel() for p in parameters) == size
    assert all(p.is_meta for p in parameters)
    config = model.config.get_text_config()
    assert config.num_hidden_layers == (94 if "235B" in name else 48)
    assert config.num_experts == 128
    assert num_parameters(config).total <= size


@pytest.mark.parametrize(("name", "active"), ACTIVE.items(), ids=list(ACTIVE))
def test_active_parameters_give_the_models_their_names(name, active):
    config = known_config(f"Qwen/{name}")
    assert num_parameters(config).active == pytest.approx(active, rel=0.01)


def test_the_vision_model_has_both_towers():
    model = model_on_meta(known_config("Qwen/Qwen3-VL-30B-A3B-Instruct"))
    tower: nn.Module = model.model.visual
    assert sum(p.numel() for p in tower.parameters()) == 538_631_408
    decoder = sum(p.numel() for p in model.parameters()) - 538_631_408
    assert decoder == RELEASED["Qwen3-30B-A3B"]


def test_a_folder_of_the_same_name_is_not_a_known_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Qwen" / "Qwen3-30B-A3B").mkdir(parents=True)
    assert known_config("Qwen/Qwen3-30B-A3B") is None
    assert known_config("Qwen/Qwen3-235B-A22B") is not None
    assert known_config("somebody/else") is None

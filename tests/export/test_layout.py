"""The names of exported weights follow the family, not the base's files or the engine."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qwen3_sft.checkpoints.hub_writer import write_hub_model
from qwen3_sft.export.export import export_model
from qwen3_sft.records.ownership import EXPORT_MARK


@pytest.fixture(params=["hub", "fused"])
def base(request, tiny_moe, tokenizer, tmp_path):
    """A base model, stored as released or as transformers 5 has it in memory."""
    folder = tmp_path / "base"
    tiny_moe.save_pretrained(folder, save_original_format=request.param == "hub")
    tokenizer.save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    assert any("gate_up_proj" in name for name in stored) is (request.param == "fused")
    return folder


@pytest.mark.parametrize("layout", ["hub", "fused"])
def test_names_are_those_asked_for_whatever_the_base_has(base, tiny_moe, tmp_path, layout):
    model = AutoModelForCausalLM.from_pretrained(base)
    loaded_with = model._weight_conversions
    export_model(model, base, tmp_path / "model", layout=layout)
    tiny_moe.save_pretrained(tmp_path / "wanted", save_original_format=layout == "hub")
    ours, wanted = (
        load_file(tmp_path / name / "model.safetensors") for name in ("model", "wanted")
    )
    assert ours.keys() == wanted.keys()
    assert all(torch.equal(ours[name], wanted[name]) for name in wanted)
    assert json.loads((tmp_path / "model" / EXPORT_MARK).read_text())["layout"] == layout
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert all(torch.equal(p, again.get_parameter(n)) for n, p in model.named_parameters())
    assert model._weight_conversions is loaded_with


def test_a_step_checkpoint_of_a_whole_model_has_the_hubs_names(base, tmp_path):
    write_hub_model(AutoModelForCausalLM.from_pretrained(base), tmp_path / "step")
    stored = load_file(tmp_path / "step" / "model.safetensors")
    assert "model.layers.1.mlp.experts.7.down_proj.weight" in stored
    assert not [name for name in stored if "gate_up_proj" in name]

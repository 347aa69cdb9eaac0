"""Every exported name is one that vLLM and SGLang load, and none that they need is missing.

`weight_names.json` holds what their loaders do with a name, read in their source: a pattern, the
parameter that it becomes a part of, and which part.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from qwen3_sft.checkpoints.hub_writer import HubWriter
from qwen3_sft.checkpoints.state_tensors import full_tensors
from qwen3_sft.demo.model import tiny_config, tiny_model

TABLES = json.loads((Path(__file__).parent / "weight_names.json").read_text())
LAYERS, EXPERTS = 3, 4
MODELS = {
    "plain": {},
    "bias": {"attention_bias": True},
    "one dense layer": {"mlp_only_layers": [1]},
    "tied": {"tie_word_embeddings": True},
}


def names(folder: Path, layout: str, **overrides) -> list[str]:
    """The names of the weights in a written model."""
    sizes = {"hidden_size": 32, "head_dim": 8, "moe_intermediate_size": 24, "num_experts": EXPERTS}
    model = tiny_model(tiny_config(64, num_hidden_layers=LAYERS, **sizes, **overrides))
    writer = HubWriter(model, folder, torch.float32, layout=layout)
    for name, tensor in full_tensors(model):
        writer.add(name, tensor)
    writer.close()
    with safe_open(folder / "model.safetensors", "pt") as file:
        return list(file.keys())


def read_by(reader: str, given: list[str]) -> tuple[dict[str, set[str]], list[str]]:
    """Return the parts that each parameter of the reader's gets, and the names it does not use."""
    parts, lost = defaultdict(set), []
    for name in given:
        rules = [(re.fullmatch(p, name), to, part) for p, to, part in TABLES[reader]["rules"]]
        found = [(match.expand(to), match.expand(part)) for match, to, part in rules if match]
        assert len(found) < 2, f"{name}: two rules"
        for parameter, part in found:
            assert part not in parts[parameter], f"{parameter} gets {part!r} twice"
            parts[parameter].add(part)
        lost += [name] * (not found)
    return dict(parts), lost


def needed(overrides: dict) -> dict[str, set[str]]:
    """The parameters of a Qwen3-MoE in these engines, and the parts they are put together from."""
    kinds = ("weight", "bias") if overrides.get("attention_bias") else ("weight",)
    parts = {"model.embed_tokens.weight": {""}, "model.norm.weight": {""}}
    if not overrides.get("tie_word_embeddings"):
        parts["lm_head.weight"] = {""}
    each = [str(e) for e in range(EXPERTS)]
    for layer in (f"model.layers.{i}" for i in range(LAYERS)):
        for norm in ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm"):
            parts[f"{layer}.{norm}.weight"] = {""}
        parts[f"{layer}.self_attn.k_norm.weight"] = {""}
        for kind in kinds:
            parts[f"{layer}.self_attn.qkv_proj.{kind}"] = {"q", "k", "v"}
            parts[f"{layer}.self_attn.o_proj.{kind}"] = {""}
        if overrides.get("mlp_only_layers") and layer.endswith(".1"):
            parts[f"{layer}.mlp.gate_up_proj.weight"] = {"gate", "up"}
            parts[f"{layer}.mlp.down_proj.weight"] = {""}
        else:
            parts[f"{layer}.mlp.gate.weight"] = {""}
            both = {f"{e} {kind}" for e in each for kind in ("gate", "up")}
            parts[f"{layer}.mlp.experts.w13_weight"] = both
            parts[f"{layer}.mlp.experts.w2_weight"] = set(each)
    return parts


@pytest.mark.parametrize("reader", TABLES)
@pytest.mark.parametrize("overrides", MODELS.values(), ids=MODELS)
def test_every_weight_of_an_export_arrives(tmp_path, reader, overrides):
    parts, lost = read_by(reader, names(tmp_path, "hub", **overrides))
    assert not lost
    assert parts == needed(overrides)


@pytest.mark.parametrize(("reader", "are_lost"), [("vllm", False), ("sglang", True)])
def test_who_reads_fused_experts(tmp_path, reader, are_lost):
    given = names(tmp_path, "fused")
    parts, lost = read_by(reader, given)
    assert set(lost) == ({name for name in given if ".experts." in name} if are_lost else set())
    assert (parts.keys() == needed({}).keys()) is not are_lost

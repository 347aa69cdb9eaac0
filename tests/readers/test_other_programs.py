"""Other programs read an export: the same numbers, the same end of a turn.

`bash tests/run.sh -m readers`; the table of results is docs/readers.md.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoTokenizer
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRotaryEmbedding

from tests.readers.environments import llama_cpp_source, run_in
from tests.support.oracle import assert_close
from tests.support.source_tree import ROOT

pytestmark = pytest.mark.readers
HERE = ROOT / "tests" / "readers"
CHAT = "<|im_start|>user\nHi<|im_end|>\n"


def told_by(environment, script, exported, tmp_path):
    run_in(
        environment,
        HERE / script,
        exported.folder,
        exported.folder.parent / "ids.npy",
        tmp_path / "told",
    )
    logits = np.load(tmp_path / "told.npy")
    return json.loads((tmp_path / "told.json").read_text()), torch.from_numpy(logits)


@pytest.mark.parametrize("layout", ["hub"], indirect=True)
def test_transformers_4_57(exported, rope, tmp_path):
    told, logits = told_by("transformers4", "in_transformers4.py", exported, tmp_path)
    assert told["missing"] == told["unexpected"] == []
    assert_close(logits, torch.from_numpy(exported.logits), rms=1e-5)
    config = AutoConfig.from_pretrained(exported.folder)
    rotary = Qwen3MoeRotaryEmbedding(config)
    assert told["inv_freq"] == rotary.inv_freq.tolist()
    assert told["attention_scaling"] == rotary.attention_scaling
    assert told["rope_theta"] == exported.theta
    assert told["rope_scaling"] == (exported.rope if rope == "yarn" else None)
    assert (told["num_experts"], told["dtype"]) == (8, "torch.float32")
    assert told["config_eos"] == exported.turn_end
    assert told["generation_eos"] == [exported.turn_end, exported.other_end]
    assert told["tokenizer"] == ["<|im_end|>", "<|endoftext|>"]
    assert told["ids"] == AutoTokenizer.from_pretrained(exported.folder)(CHAT).input_ids


@pytest.mark.parametrize("layout", ["fused"], indirect=True)
@pytest.mark.parametrize("rope", ["default"], indirect=True)
def test_transformers_4_57_draws_fused_experts_at_random(exported, tmp_path):
    """A reason for the hub's names; it says so in a warning only."""
    told, _ = told_by("transformers4", "in_transformers4.py", exported, tmp_path)
    assert "model.layers.0.mlp.experts.0.up_proj.weight" in told["missing"]
    assert "model.layers.0.mlp.experts.gate_up_proj" in told["unexpected"]


NO_YARN = pytest.mark.xfail(
    strict=True, reason="mlx-lm 0.32.2 reads no rope_scaling for Qwen3-MoE", raises=AssertionError
)


@pytest.mark.parametrize("layout", ["hub"], indirect=True)
@pytest.mark.parametrize("rope", ["default", pytest.param("yarn", marks=NO_YARN)], indirect=True)
def test_mlx_lm(exported, tmp_path):
    told, logits = told_by("mlx", "in_mlx.py", exported, tmp_path)
    assert told["rope_theta"] == exported.theta
    assert told["eos"] == sorted([exported.turn_end, exported.other_end])
    assert told["ids"] == AutoTokenizer.from_pretrained(exported.folder)(CHAT).input_ids
    assert_close(logits, torch.from_numpy(exported.logits), rms=1e-4)


def test_llama_cpp_converts(exported, rope, layout, tmp_path):
    run_in(
        "llama_cpp",
        HERE / "in_llama_cpp.py",
        llama_cpp_source(),
        exported.folder,
        tmp_path / "told",
    )
    told, tensors = json.loads((tmp_path / "told.json").read_text()), np.load(tmp_path / "told.npz")
    assert told["general.architecture"] == "qwen3moe"
    assert told["qwen3moe.expert_count"] == 8
    assert told["qwen3moe.rope.freq_base"] == exported.theta
    assert told["tokenizer.ggml.eos_token_id"] == exported.turn_end
    assert told["tokenizer.ggml.padding_token_id"] == exported.other_end
    if rope == "yarn":
        assert told["qwen3moe.rope.scaling.type"] == "yarn"
        assert told["qwen3moe.rope.scaling.factor"] == exported.rope["factor"]
        original = told["qwen3moe.rope.scaling.original_context_length"]
        assert original == exported.rope["original_max_position_embeddings"]
    wanted = in_gguf(exported.weights)
    assert {*tensors} == {*wanted}
    for name, tensor in wanted.items():
        assert np.array_equal(tensors[name], tensor.numpy()), name


def in_gguf(weights):
    """The tensors of llama.cpp's qwen3moe, by its names."""
    tensors = {
        "token_embd.weight": weights["model.embed_tokens.weight"],
        "output_norm.weight": weights["model.norm.weight"],
        "output.weight": weights["lm_head.weight"],
    }
    attention = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "output"}
    attention |= {"q_norm": "q_norm", "k_norm": "k_norm"}
    for layer in range(2):
        block, inner = f"model.layers.{layer}", f"blk.{layer}"
        for theirs, name in attention.items():
            tensors[f"{inner}.attn_{name}.weight"] = weights[f"{block}.self_attn.{theirs}.weight"]
        tensors[f"{inner}.attn_norm.weight"] = weights[f"{block}.input_layernorm.weight"]
        tensors[f"{inner}.ffn_norm.weight"] = weights[f"{block}.post_attention_layernorm.weight"]
        tensors[f"{inner}.ffn_gate_inp.weight"] = weights[f"{block}.mlp.gate.weight"]
        gate, up = weights[f"{block}.mlp.experts.gate_up_proj"].chunk(2, dim=1)
        tensors[f"{inner}.ffn_gate_exps.weight"], tensors[f"{inner}.ffn_up_exps.weight"] = gate, up
        tensors[f"{inner}.ffn_down_exps.weight"] = weights[f"{block}.mlp.experts.down_proj"]
    return tensors

"""Older names beside the newer ones: the same model to transformers 5, a right one to others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, Qwen3MoeConfig, Qwen3VLMoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRotaryEmbedding

from qwen3_sft.checkpoints.config_keys import with_older_keys, with_older_tokenizer_keys
from qwen3_sft.demo.model import tiny_config

YARN = {
    "rope_type": "yarn", "rope_theta": 5e6, "factor": 4.0, "beta_fast": 16.0,
    "original_max_position_embeddings": 1024,
}  # fmt: skip
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 1e6},
    "yarn": YARN,
    "yarn over all": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 2.0},
    "linear": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 8.0},
    "partial": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
}


def write(config, folder, change=lambda content: content):
    config.save_pretrained(folder)
    path = folder / "config.json"
    content = change(json.loads(path.read_text()))
    path.write_text(json.dumps(content))
    return content


def values(config):
    return {key: value for key, value in config.to_dict().items() if key != "_name_or_path"}


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_transformers_5_reads_the_same_model(tmp_path, rope):
    config = tiny_config(rope_parameters=dict(rope), dtype="bfloat16")
    write(config, tmp_path / "plain")
    content = write(config, tmp_path / "both", with_older_keys)
    plain, both = (AutoConfig.from_pretrained(tmp_path / name) for name in ("plain", "both"))
    assert values(both) == values(plain)
    rotary = [Qwen3MoeRotaryEmbedding(c) for c in (config, both)]
    assert torch.equal(rotary[0].inv_freq, rotary[1].inv_freq)
    assert rotary[0].attention_scaling == rotary[1].attention_scaling
    assert content["rope_theta"] == rope["rope_theta"]
    assert with_older_keys(content) == content


def test_yarn_keeps_its_fields_and_default_has_no_scaling():
    yarn = with_older_keys({"rope_parameters": YARN})
    assert yarn["rope_scaling"] == {k: v for k, v in YARN.items() if k != "rope_theta"}
    assert with_older_keys({"rope_parameters": ROPES["default"]})["rope_scaling"] is None
    partial = with_older_keys({"rope_parameters": ROPES["partial"]})
    assert (partial["partial_rotary_factor"], partial["rope_scaling"]) == (0.5, None)


def test_what_transformers_4_cannot_say_is_left_out():
    by_layer = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}
    for parameters in (by_layer, {"rope_type": "axial", "rope_theta": 1e4}):
        assert "rope_scaling" not in with_older_keys({"rope_parameters": parameters})


def test_configs_within_a_config_have_them_too(tmp_path):
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]}
    config = Qwen3VLMoeConfig(text_config={"num_experts": 4, "rope_parameters": rope})
    content = write(config, tmp_path, with_older_keys)["text_config"]
    assert content["num_experts"] == content["num_local_experts"] == 4
    assert content["rope_theta"] == 5e6
    assert content["rope_scaling"] == {"rope_type": "default", "mrope_section": [24, 20, 20]}
    assert values(AutoConfig.from_pretrained(tmp_path)) == values(config)


@pytest.mark.parametrize("name", ["num_experts", "num_local_experts"])
def test_experts_are_counted_under_both_names(name):
    both = with_older_keys({name: 8})
    assert both == {"num_experts": 8, "num_local_experts": 8}


def test_the_width_of_a_head_is_written_out():
    config = {"hidden_size": 64, "num_attention_heads": 4, "rope_parameters": ROPES["default"]}
    assert with_older_keys(config)["head_dim"] == 16
    assert with_older_keys(config | {"head_dim": 32})["head_dim"] == 32


def test_transformers_4_57_would_fill_in_nothing_wrong(tmp_path):
    """What 4.57.3 takes when a key is missing is what the model has, for every key it knows."""
    file = Path(__file__).parents[1] / "readers" / "transformers_4_57_3.json"
    defaults = json.loads(file.read_text())["Qwen3MoeConfig"]
    assert len(defaults) > 25
    config = tiny_config(
        rope_parameters=dict(YARN), norm_topk_prob=True, rms_norm_eps=1e-5, eos_token_id=[3, 1],
        mlp_only_layers=[1], decoder_sparse_step=2, router_aux_loss_coef=0.5, attention_bias=True,
    )  # fmt: skip
    content = write(config, tmp_path, with_older_keys)
    for key, default in defaults.items():
        assert content.get(key, default) == wanted(config, key), key


def wanted(config: Qwen3MoeConfig, key: str):
    if key == "rope_theta":
        return YARN[key]
    if key == "rope_scaling":
        return {k: v for k, v in YARN.items() if k != "rope_theta"}
    return getattr(config, key)


def test_a_tokenizer_in_the_words_of_transformers_4(tokenizer, tmp_path):
    """Its list of extra tokens stops 4.57.3, which also knows no TokenizersBackend."""
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    new = json.loads(path.read_text()) | {"extra_special_tokens": ["<|box_start|>", "<|box_end|>"]}
    assert new["tokenizer_class"] == "TokenizersBackend"
    old = with_older_tokenizer_keys(new)
    assert "extra_special_tokens" not in old
    assert old["tokenizer_class"] == "PreTrainedTokenizerFast"
    read = []
    for content in (new, old):
        path.write_text(json.dumps(content))
        read.append(AutoTokenizer.from_pretrained(tmp_path))
    assert read[0].get_vocab() == read[1].get_vocab()
    assert read[0].all_special_tokens == read[1].all_special_tokens
    assert type(read[0]) is type(read[1])

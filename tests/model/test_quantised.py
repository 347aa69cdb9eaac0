"""Quantised base models are refused by name, from whatever says that they are."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen3_sft.errors import ModelError
from qwen3_sft.model.base import checked_base
from qwen3_sft.model.loading import resolve_model
from qwen3_sft.model.quantised import refuse_quantised, unquantised

UP = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"quantization_config": {"quant_method": "fp8", "fmt": "e4m3"}}, "with FP8"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "with GPTQ"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "with AWQ"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "with MXFP4"),
        (
            {"quantization_config": {"quant_method": "compressed-tensors"}},
            "with compressed-tensors",
        ),
        ({"quantization_config": {"quant_algo": "NVFP4"}}, "with NVFP4"),
        ({"quantization_config": {"load_in_4bit": True}}, "quantised, as quantization_config"),
        ({"compression_config": {"format": "x"}}, "as compression_config of"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "as quantization of"),
        ({"some": {"text_config": {"quantization_config": {"quant_method": "hqq"}}}}, "with HQQ"),
    ],
    ids=str,
)
def test_by_its_config(base, change, entries, words):
    change(base, **entries)
    (base / "model.safetensors").unlink()  # nothing is asked of the weights
    with pytest.raises(ModelError, match=words):
        resolve_model(str(base))


@pytest.mark.parametrize("value", [None, {}])
def test_entries_that_say_nothing_are_let_through(base, value):
    config = json.loads((base / "config.json").read_text()) | {"quantization_config": value}
    (base / "config.json").write_text(json.dumps(config))
    checked_base(resolve_model(str(base)))


def test_an_entry_that_was_left_over_is_told_so(base, change):
    change(base, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(
        ModelError, match="not quantised: if that is right, remove quantization_conf"
    ):
        resolve_model(str(base))


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("quantize_config.json", {"bits": 4, "desc_act": False}, "with GPTQ, as quantize_config"),
        ("quant_config.json", {"w_bit": 4, "version": "GEMM"}, "with AWQ, as quant_config"),
        ("hf_quant_config.json", {"quantization": {}}, "with ModelOpt, as hf_quant_config"),
    ],
)
def test_by_the_file_of_an_older_tool(base, file, content, words):
    (base / file).write_text(json.dumps(content))
    with pytest.raises(ModelError, match=words):
        resolve_model(str(base))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (UP + "_scale_inv", torch.bfloat16),
        (UP.removesuffix("weight") + "qweight", torch.int32),
        (UP.removesuffix("weight") + "weight_packed", torch.int32),
        (UP + ".absmax", torch.uint8),
        (UP + ".quant_state.bitsandbytes__nf4", torch.uint8),
        ("model.layers.0.mlp.experts.gate_up_proj_blocks", torch.uint8),
        (UP, torch.float8_e4m3fn),
        (UP, torch.int8),
    ],
)
@pytest.mark.parametrize("has_index", [False, True])
def test_by_names_and_dtypes_of_its_weights(base, name, dtype, has_index):
    tensors = load_file(base / "model.safetensors")
    shape = tensors[UP].shape
    save_file(tensors | {name: torch.zeros(shape, dtype=dtype)}, base / "model.safetensors")
    if has_index:  # which says the names before the weights are here
        weight_map = dict.fromkeys([*tensors, name], "model.safetensors")
        index = json.dumps({"metadata": {}, "weight_map": weight_map})
        (base / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match=rf"quantised.*the tensor {name}|{name} in .*elements are"):
        checked_base(resolve_model(str(base)))


@pytest.mark.parametrize(
    ("name", "origin"),
    [
        ("Qwen/Qwen3-30B-A3B-FP8", "Qwen/Qwen3-30B-A3B"),
        ("Qwen/Qwen3-30B-A3B-GPTQ-Int4", "Qwen/Qwen3-30B-A3B"),
        ("Qwen/Qwen3-235B-A22B-Instruct-2507-FP8", "Qwen/Qwen3-235B-A22B-Instruct-2507"),
        ("cpatonn/Qwen3-30B-A3B-Instruct-2507-AWQ-4bit", "Qwen/Qwen3-30B-A3B-Instruct-2507"),
        ("unsloth/Qwen3-30B-A3B-Base-unsloth-bnb-4bit", "Qwen/Qwen3-30B-A3B-Base"),
        ("RedHatAI/Qwen3-30B-A3B-quantized.w4a16", "Qwen/Qwen3-30B-A3B"),
        ("RedHatAI/Qwen3-30B-A3B-FP8-dynamic", "Qwen/Qwen3-30B-A3B"),
        ("mlx-community/Qwen3-30B-A3B-4bit", "Qwen/Qwen3-30B-A3B"),
        ("nvidia/Qwen3-30B-A3B-NVFP4", "Qwen/Qwen3-30B-A3B"),
        ("/models/Qwen3-Coder-30B-A3B-Instruct-FP8/", "Qwen/Qwen3-Coder-30B-A3B-Instruct"),
        ("Qwen/Qwen9-70B-A7B-FP8", "Qwen/Qwen9-70B-A7B"),
        ("somebody/tuned-30b-awq", None),
        ("/models/base", None),
    ],
)
def test_the_unquantised_repository_is_named(tmp_path, name, origin):
    assert unquantised(name, {}) == origin
    words = f"use --model_name_or_path {origin}$" if origin else "use the model that it was made"
    with pytest.raises(ModelError, match=words):
        refuse_quantised(tmp_path, {"quantization_config": {"quant_method": "fp8"}}, name)

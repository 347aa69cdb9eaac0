import json

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import monkey_patch
from qwen3_sft.demo.model import write_checkpoint
from qwen3_sft.export import base_dtype, export_model, verify
from qwen3_sft.export_check import Expected, ExportError, digest, probe
from tests.oracle import assert_close
from tests.training import PATCHES


@pytest.fixture
def base(tokenizer, tmp_path):
    folder = tmp_path / "base"
    write_checkpoint(folder, tokenizer)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_export_has_hub_layout_and_the_trained_weights(base, tmp_path, dtype):
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    monkey_patch.apply_patches(model, PATCHES)
    export_model(model, base, tmp_path / "model", dtype)

    exported = safetensors.torch.load_file(tmp_path / "model" / "model.safetensors")
    original = safetensors.torch.load_file(base / "model.safetensors")
    assert exported.keys() == original.keys()
    assert "model.layers.3.mlp.experts.15.gate_proj.weight" in exported
    assert {k: t.shape for k, t in exported.items()} == {k: t.shape for k, t in original.items()}
    assert {t.dtype for t in exported.values()} == {dtype}
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["num_experts"] == config["num_local_experts"] == 16
    assert config["dtype"] == str(dtype).removeprefix("torch.")

    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for name, parameter in reloaded.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name).to(dtype)), name
    ids = torch.arange(20)[None]
    live, again = model(ids, use_cache=False).logits, reloaded(ids, use_cache=False).logits
    assert_close(again.float(), live, rms=1e-5 if dtype == torch.float32 else 5e-2)
    assert not list(tmp_path.glob(".model*"))


def test_tokenizer_and_template_are_copied_byte_by_byte(base, tmp_path):
    export_model(AutoModelForCausalLM.from_pretrained(base), base, tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "model" / name).read_bytes() == (base / name).read_bytes()
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template


def test_default_dtype_is_the_base_models(base, tmp_path):
    assert base_dtype(base) == torch.float32
    config = json.loads((base / "config.json").read_text())
    for key in ("dtype", "torch_dtype"):
        config = {k: v for k, v in config.items() if "dtype" not in k} | {key: "bfloat16"}
        (base / "config.json").write_text(json.dumps(config))
        assert base_dtype(base) == torch.bfloat16


@pytest.mark.parametrize("is_isolated", [False, True])
@pytest.mark.parametrize("damage", [None, "weight", "key", "logits"])
def test_the_check_finds_what_differs(base, damage, is_isolated):
    model = AutoModelForCausalLM.from_pretrained(base)
    digests = {name: digest(tensor) for name, tensor in model.state_dict().items()}
    expected = Expected(digests, probe(model))
    if damage == "weight":
        digests["model.layers.1.mlp.experts.down_proj"] = "0"
        words = r"layers\.1\.mlp\.experts\.down_proj differs"
    elif damage == "key":
        del digests["model.norm.weight"]
        words = r"keys differ: model\.norm\.weight"
    elif damage == "logits":
        expected.logits[0, 3] += 1
        words = "probe logits differ"
    if damage is None:
        verify(base, expected, is_isolated=is_isolated)
    else:
        with pytest.raises(ExportError, match=words):
            verify(base, expected, is_isolated=is_isolated)
    assert not (base / ".expected").exists()


def test_a_model_that_says_nothing_finite_is_not_published(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").touch()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(ExportError, match="nan"):
        export_model(model, base, tmp_path / "model")
    assert [p.name for p in (tmp_path / "model").iterdir()] == ["old"]


def test_digest_sees_dtype_shape_and_bits():
    tensor = torch.arange(6.0)
    others = [tensor.bfloat16(), tensor.view(2, 3), -tensor, tensor[:5], tensor.double()]
    assert len({digest(t) for t in (tensor, *others)}) == 6
    assert digest(tensor) == digest(tensor.clone())
    assert digest(torch.eye(3).T) == digest(torch.eye(3))

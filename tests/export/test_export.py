import json

import pytest
import safetensors.torch
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import AutoModelForCausalLM, AutoTokenizer

import monkey_patch
from qwen3_sft.checkpoints.hub_writer import HubWriter, write_hub_model
from qwen3_sft.checkpoints.state_tensors import full_tensors
from qwen3_sft.demo.model import write_checkpoint
from qwen3_sft.errors import ExportError
from qwen3_sft.export.check import Expected, digest, probe
from qwen3_sft.export.export import base_dtype, export_model, verify
from qwen3_sft.records.ownership import EXPORT_MARK, mark_export
from tests.support.oracle import assert_close
from tests.support.training import PATCHES


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
    written = base / "tokenizer_config.json"
    written.write_text(written.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
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


@pytest.mark.parametrize(
    ("damage", "is_isolated"),
    [
        *((damage, False) for damage in (None, "weight", "key", "logits")),
        *((damage, True) for damage in (None, "weight")),
        *(pytest.param(damage, True, marks=pytest.mark.long) for damage in ("key", "logits")),
    ],
)
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
    mark_export(tmp_path / "model", base, "float32")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(ExportError, match="nan"):
        export_model(model, base, tmp_path / "model")
    assert {p.name for p in (tmp_path / "model").iterdir()} == {"old", EXPORT_MARK}


def tensors_of(folder):
    """Every tensor of a hub folder, and the file it lies in."""
    files = {path.name: safetensors.torch.load_file(path) for path in folder.glob("*.safetensors")}
    return {key: (tensor, name) for name, held in files.items() for key, tensor in held.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_files_are_those_of_save_pretrained(tiny_moe, tmp_path, dtype):
    """Bit by bit, headers and index included; only the cut between files follows our order."""
    write_hub_model(tiny_moe, tmp_path / "ours", dtype)
    write_hub_model(tiny_moe, tmp_path / "parts", dtype, max_shard_bytes=150_000)
    tiny_moe.to(dtype).save_pretrained(tmp_path / "theirs")
    tiny_moe.save_pretrained(tmp_path / "their_parts", max_shard_size=150_000)
    weights = "model.safetensors"
    assert (tmp_path / "ours" / weights).read_bytes() == (
        tmp_path / "theirs" / weights
    ).read_bytes()
    assert [p.name for p in (tmp_path / "ours").iterdir()] == [weights]

    ours, theirs = tensors_of(tmp_path / "parts"), tensors_of(tmp_path / "their_parts")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key][0], theirs[key][0]) for key in ours)
    index, expected = (
        json.loads((tmp_path / name / f"{weights}.index.json").read_text())
        for name in ("parts", "their_parts")
    )
    assert index["metadata"] == expected["metadata"]
    assert index["weight_map"] == {key: name for key, (_, name) in ours.items()}
    with safetensors.safe_open(tmp_path / "parts" / ours["model.norm.weight"][1], "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_files_are_filled_to_the_limit_and_no_further(tiny_moe, tmp_path):
    limit = 150_000
    write_hub_model(tiny_moe, tmp_path, torch.float32, limit)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    count = len(files)
    assert count > 5
    assert files == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    held = [safetensors.torch.load_file(tmp_path / name) for name in files]
    sizes = [sum(tensor.nbytes for tensor in tensors.values()) for tensors in held]
    for tensors, size, following in zip(held, sizes, [*sizes[1:], None], strict=True):
        assert size <= limit or len(tensors) == 1
        assert following is None or size + following > limit
    # The embedding (1024 x 64 float32) alone exceeds it; an expert's matrices are spread.
    assert sizes.count(1024 * 64 * 4) == 2
    experts = {name for key, (_, name) in tensors_of(tmp_path).items() if "layers.0.mlp.exp" in key}
    assert len(experts) > 1


def test_a_model_in_several_files_is_checked_and_loads(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    export_model(model, base, tmp_path / "model", max_shard_bytes=1_000_000)
    assert not (tmp_path / "model" / "model.safetensors").exists()
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert all(torch.equal(p, model.get_parameter(n)) for n, p in reloaded.named_parameters())


def test_no_more_than_a_file_of_tensors_is_held(tiny_moe, tmp_path):
    limit = 200_000
    writer = HubWriter(tiny_moe, tmp_path, torch.float32, limit)
    largest = 0
    for name, tensor in full_tensors(tiny_moe):
        writer.add(name, tensor)
        largest = max(largest, sum(part.nbytes for part in writer._pending.values()))
    assert 0 < largest <= 1024 * 64 * 4


def test_tied_weights_are_written_once_as_save_pretrained_does(tiny_moe, tokenizer, tmp_path):
    config = tiny_moe.config
    config.tie_word_embeddings = True
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    names = [name for name, _ in full_tensors(model)]
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    export_model(model, tmp_path / "base", tmp_path / "model")
    original = (tmp_path / "base" / "model.safetensors").read_bytes()
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == original


def test_names_are_free_of_what_wrappers_add(tiny_moe):
    plain = [name for name, _ in full_tensors(tiny_moe)]
    layers = tiny_moe.model.layers
    layers[0] = checkpoint_wrapper(layers[0])
    layers[1].self_attn = torch.compile(layers[1].self_attn)
    assert plain != list(tiny_moe.state_dict())
    assert [name for name, _ in full_tensors(tiny_moe)] == plain


def test_float32_weights_of_a_model_that_computes_in_bfloat16(base, tmp_path):
    """As accelerate wraps it: the forward pass in bfloat16, its result widened again."""
    model = AutoModelForCausalLM.from_pretrained(base)
    forward = model.forward

    def in_bfloat16(*args, **kwargs):
        with torch.autocast("cpu", torch.bfloat16):
            output = forward(*args, **kwargs)
        output.logits = output.logits.float()
        return output

    model.forward = in_bfloat16
    assert probe(model).dtype == torch.bfloat16
    export_model(model, base, tmp_path / "model", torch.float32)


@pytest.mark.parametrize("obstacle", ["file", "base"])
def test_what_the_disk_refuses_is_an_export_error(base, tmp_path, obstacle):
    model = AutoModelForCausalLM.from_pretrained(base)
    if obstacle == "file":
        (tmp_path / "model").write_text("mine")
    else:
        (base / "config.json").unlink()
    with pytest.raises(ExportError, match="a file stands in" if obstacle == "file" else "config"):
        export_model(model, base, tmp_path / "model")
    assert obstacle == "base" or (tmp_path / "model").read_text() == "mine"


def test_digest_sees_dtype_shape_and_bits():
    tensor = torch.arange(6.0)
    others = [tensor.bfloat16(), tensor.view(2, 3), -tensor, tensor[:5], tensor.double()]
    assert len({digest(t) for t in (tensor, *others)}) == 6
    assert digest(tensor) == digest(tensor.clone())
    assert digest(torch.eye(3).T) == digest(torch.eye(3))


def test_an_export_is_marked_and_may_replace_itself(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    (tmp_path / "link").symlink_to(tmp_path / "model")  # a model folder on another disk
    for dtype, name in ((torch.float32, "model"), (torch.bfloat16, "link")):
        export_model(model, base, tmp_path / name, dtype, source=tmp_path / "run")
        mark = json.loads((tmp_path / "model" / EXPORT_MARK).read_text())
        assert mark["dtype"] == str(dtype).removeprefix("torch.")
        assert mark["source"] == f"{tmp_path.name}/run"
        there = {path.name for path in (tmp_path / "model").iterdir()}
        assert there == {EXPORT_MARK, *mark["files"]}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "link", "model"]


def test_what_came_into_the_folder_meanwhile_stays(base, tmp_path, monkeypatch):
    def verify_slowly(*args, **kwargs):
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "mine").touch()

    monkeypatch.setattr("qwen3_sft.export.export.verify", verify_slowly)
    model = AutoModelForCausalLM.from_pretrained(base)
    with pytest.raises(ExportError, match="holds mine"):
        export_model(model, base, tmp_path / "model")
    assert [p.name for p in (tmp_path / "model").iterdir()] == ["mine"]
    assert (tmp_path / ".model.qwen3_sft-partial" / "model.safetensors").is_file()

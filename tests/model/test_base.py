"""What a base model's folder tells is told before data is read; what stock loads is let through."""

import json
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen3_sft.errors import ModelError
from qwen3_sft.model.base import checked_base
from qwen3_sft.model.base_files import INDEX, read_headers
from qwen3_sft.model.config_file import GENERATION
from qwen3_sft.model.loading import load_strict, resolve_model

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7000000\n"
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


def weights(folder):
    return load_file(folder / "model.safetensors")


def write(folder, tensors, file="model.safetensors"):
    save_file(tensors, folder / file, {"format": "pt"})


def shard(folder):
    """Cut the weights into two files with an index; return the index."""
    tensors = weights(folder)
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2]}
    parts["model-00002-of-00002.safetensors"] = names[1::2]
    for file, part in parts.items():
        write(folder, {name: tensors[name] for name in part}, file)
    index = {
        "metadata": {},
        "weight_map": {name: file for file, part in parts.items() for name in part},
    }
    (folder / INDEX).write_text(json.dumps(index))
    return index


def fused(folder):
    tensors = weights(folder)
    out = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer in range(2):
        at = f"model.layers.{layer}.mlp.experts"
        part = {
            kind: torch.stack([tensors[f"{at}.{e}.{kind}_proj.weight"] for e in range(4)])
            for kind in ("gate", "up", "down")
        }
        out[f"{at}.gate_up_proj"] = torch.cat([part["gate"], part["up"]], dim=1)
        out[f"{at}.down_proj"] = part["down"]
    write(folder, out)


def tied(folder):
    tensors = weights(folder)
    del tensors["lm_head.weight"]
    write(folder, tensors)


def without_prefix(folder):
    tied(folder)
    tensors = weights(folder)
    write(folder, {name.removeprefix("model."): tensor for name, tensor in tensors.items()})


def with_old_buffers(folder):
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}
    write(folder, weights(folder) | buffer)


@pytest.mark.parametrize(
    ("rewrite", "entries"),
    [
        (lambda folder: None, {}),
        (shard, {}),
        (fused, {}),
        (tied, {"tie_word_embeddings": True}),
        (without_prefix, {"tie_word_embeddings": True}),
        (with_old_buffers, {}),
        (lambda folder: None, {"head_dim": None}),
        (lambda folder: None, {"num_local_experts": None, "num_experts": 4}),
    ],
    ids=["plain", "shards", "fused", "tied", "no_prefix", "buffers", "no_head_dim", "old_names"],
)
def test_what_stock_loads_is_let_through(base, change, rewrite, entries):
    rewrite(base)
    change(base, **entries)
    checked = checked_base(resolve_model(str(base)))
    assert checked.folder == base
    loaded = load_strict(base)  # the same verdict, with the weights read
    assert loaded.state_dict().keys() == checked.model.state_dict().keys()


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def cut_in_the_header(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:500])


def too_long(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"x" * 100)


def dangling(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(folder / "blobs" / "gone")


def shard_missing(folder):
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def shard_dangling(folder):
    shard_missing(folder)
    (folder / "model-00002-of-00002.safetensors").symlink_to("gone")


def shard_pointer(folder):
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").write_text(LFS)


def twice(folder):
    shard(folder)
    file = folder / "model-00001-of-00002.safetensors"
    save_file(load_file(file) | {EXPERT: torch.zeros(96, 128)}, file)


def stale(folder):
    shutil.copy(folder / "model.safetensors", folder / "kept")
    shard(folder)
    (folder / "kept").rename(folder / "model.safetensors")


def without(name):
    def remove(folder):
        tensors = weights(folder)
        del tensors[name]
        write(folder, tensors)

    return remove


def one_more(folder):
    write(folder, weights(folder) | {"model.layers.9.mlp.gate.weight": torch.zeros(4, 128)})


def other_shape(folder):
    write(folder, weights(folder) | {EXPERT: torch.zeros(96, 127)})


def nested_as_run(folder):
    inside = folder / "model"
    shutil.copytree(folder, folder.parent / "copy")
    shutil.rmtree(folder)
    (folder.parent / "copy").rename(inside.parent.parent / "run_model")
    folder.mkdir()
    (inside.parent.parent / "run_model").rename(inside)


def as_adapter(folder):
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "Qwen/X"}')


def only(name):
    def rewrite(folder):
        (folder / "model.safetensors").rename(folder / name)

    return rewrite


def text(file, content):
    def rewrite(folder):
        (folder / file).write_text(content)

    return rewrite


@pytest.mark.parametrize(
    ("breaks", "words"),
    [
        (cut, r"model\.safetensors: cut off or damaged"),
        (cut_in_the_header, r"model\.safetensors: cut off or damaged"),
        (too_long, r"model\.safetensors: cut off or damaged"),
        (text("model.safetensors", ""), r"model\.safetensors is empty"),
        (text("model.safetensors", "abc"), r"model\.safetensors: cut off or damaged"),
        (text("model.safetensors", LFS), r"model\.safetensors is a Git LFS pointer.*git lfs pull"),
        (text("tokenizer.json", LFS), r"tokenizer\.json is a Git LFS pointer"),
        (text("config.json", LFS), r"config\.json is a Git LFS pointer"),
        (text("model.safetensors", "<!DOCTYPE html><html>"), "a page of HTML"),
        (dangling, r"model\.safetensors is a link to .*gone, which is gone"),
        (shard_missing, r"1 of 2 files .* missing: model-00002-of-00002\.safetensors"),
        (shard_dangling, r"1 of 2 files .* missing: model-00002-of-00002\.safetensors"),
        (shard_pointer, r"model-00002-of-00002\.safetensors is a Git LFS pointer"),
        (twice, r"up_proj\.weight is in model-0000\d"),
        (stale, r"holds model\.safetensors and an index of 2 other files"),
        (text(INDEX, "{"), r"index\.json: no JSON"),
        (text(INDEX, "{}"), r"index\.json: has no weight_map"),
        (text(INDEX, '{"weight_map": {}}'), r"index\.json: has no metadata"),
        (only("pytorch_model.bin"), r"pytorch_model\.bin is a pickle.*Convert"),
        (only("model.fp16.safetensors"), r"no model\.safetensors .*only model\.fp16"),
        (only("model-Q4_K_M.gguf"), r"model-Q4_K_M\.gguf is for llama\.cpp"),
        (without(EXPERT), rf"1 missing: {EXPERT}"),
        (without("lm_head.weight"), r"1 missing: lm_head\.weight"),
        (one_more, r"1 unexpected: model\.layers\.9\.mlp\.gate\.weight"),
        (other_shape, r"1 of another shape: .*up_proj\.weight \(96, 127\), not \(96, 128\)"),
        (nested_as_run, r"no config\.json; .* such as .*/model"),
        (as_adapter, "a LoRA adapter, not a model: merge it into its base Qwen/X"),
        (text("config.json", '{"rope_theta": NaN}'), r"config\.json: no JSON \(NaN"),
        (text(GENERATION, "{"), r"generation_config\.json: no JSON"),
        (text(GENERATION, "[]"), r"generation_config\.json: holds a JSON list"),
        (text(GENERATION, '{"eos_token_id": "x"}'), r"eos_token_id is 'x', it must be the id"),
        (text(GENERATION, '{"eos_token_id": [1, "2"]}'), r"eos_token_id is \[1, '2'\]"),
        (text(GENERATION, '{"max_new_tokens": "a"}'), r"generation_config\.json: cannot be used"),
        (text(GENERATION, LFS), r"generation_config\.json is a Git LFS pointer"),
    ],
    ids=lambda value: value if isinstance(value, str) else "made",
)
def test_damaged_folders_are_named(base, breaks, words):
    breaks(base)
    with pytest.raises(ModelError, match=words):
        checked_base(resolve_model(str(base)))


def test_an_index_that_lacks_a_tensor_is_warned_about(base, caplog):
    index = shard(base)
    del index["weight_map"][EXPERT]
    (base / INDEX).write_text(json.dumps(index))
    checked_base(base)
    assert f"where 1 tensors are, such as {EXPERT}; they are read all the same" in caplog.text
    load_strict(base)


def test_sixteen_shards_of_a_30b_take_a_moment(tmp_path):
    weight_map = {}
    for number in range(16):
        header, end = {}, 0
        for index in range(1200):
            name, size = f"model.layers.{number}.{index}.weight", 768 * 2048 * 2
            header[name] = {
                "dtype": "BF16", "shape": [768, 2048], "data_offsets": [end, end + size]
            }  # fmt: skip
            weight_map[name], end = f"model-{number}.safetensors", end + size
        words = json.dumps(header).encode()
        words += b" " * (-len(words) % 8)
        with (tmp_path / f"model-{number}.safetensors").open("wb") as file:
            file.write(len(words).to_bytes(8, "little") + words)
            file.truncate(8 + len(words) + end)  # a hole: it takes no room
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    start = time.monotonic()
    assert len(read_headers(tmp_path)) == 16 * 1200
    assert time.monotonic() - start < 5

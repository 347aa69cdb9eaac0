"""Folders with a tokenizer that is damaged, or with none: the file at fault is named."""

from __future__ import annotations

import json

import pytest

from qwen3_sft.errors import ModelError
from qwen3_sft.model.loading import load_tokenizer


@pytest.fixture
def folder(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def edited(folder, name: str, **entries) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | entries))


DAMAGES = {
    "cut off": lambda text: text[: len(text) // 2],
    "empty": lambda text: b"",
    "a list": lambda text: b"[]",
    "binary": lambda text: b"\xff\xfe\0",
    "a pointer": lambda text: b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
}


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named(folder, name, damage):
    path = folder / name
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    words = {"empty": " is empty", "a pointer": " is a Git LFS pointer"}
    expected = words.get(damage, ": (cannot be read|must hold an object)")
    with pytest.raises(ModelError, match=f"{name}{expected}"):
        load_tokenizer(folder)


@pytest.mark.parametrize("name", ["special_tokens_map.json", "added_tokens.json", "vocab.json"])
def test_files_beside_it(folder, name):
    (folder / name).write_text("3")
    with pytest.raises(ModelError, match=rf"{name}: must hold an object, found a int"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("name", "entries"),
    [
        ("tokenizer.json", {"model": {"type": "Nope"}}),  # tokenizers raises a bare Exception
        ("tokenizer.json", {"added_tokens": [{"id": "x"}]}),
        ("tokenizer_config.json", {"eos_token": 3}),
        ("tokenizer_config.json", {"tokenizer_class": 3}),
    ],
)
def test_what_the_libraries_cannot_use(folder, name, entries):
    edited(folder, name, **entries)
    with pytest.raises(ModelError, match=f"{folder}: its tokenizer cannot be loaded"):
        load_tokenizer(folder)


@pytest.mark.parametrize("template", [3, ["a"], {"a": 1}])
def test_a_template_that_is_no_text(folder, template):
    (folder / "chat_template.jinja").unlink()
    edited(folder, "tokenizer_config.json", chat_template=template)
    with pytest.raises(ModelError, match=str(folder)):
        load_tokenizer(folder)


def test_a_template_that_is_no_utf8(folder):
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe\xe9")
    with pytest.raises(ModelError, match=r"chat_template\.jinja: cannot be read"):
        load_tokenizer(folder)


@pytest.mark.parametrize("is_folder", [False, True])
def test_none_at_all(folder, is_folder):
    (folder / "tokenizer.json").unlink()
    if is_folder:
        (folder / "tokenizer.json").mkdir()
    expected = "/tokenizer.json is a folder" if is_folder else ": has no tokenizer"
    with pytest.raises(ModelError, match=f"{folder}{expected}"):
        load_tokenizer(folder)


def test_without_control_tokens(folder):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    tokens = [t for t in content["added_tokens"] if "think" not in t["content"]]
    edited(folder, "tokenizer.json", added_tokens=tokens)
    with pytest.raises(ModelError, match=f"{folder}: .* it lacks <think>, </think>"):
        load_tokenizer(folder)

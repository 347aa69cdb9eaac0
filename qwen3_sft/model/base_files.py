"""The files of a base model's folder: there, whole, and what their names say.

A clone without git-lfs has a few lines of text in place of each large file, a download that broke
off a part of it, a hub cache that was tidied a link to nothing, a proxy a page of HTML.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from qwen3_sft.errors import ModelError
from qwen3_sft.model.trust import check_index

logger = logging.getLogger(__name__)

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_LFS = b"version https://git-lfs.github.com/spec/"
_HTML = (b"<!doctype", b"<html", b"<?xml")


class Header(NamedTuple):
    """What a shard says of one tensor.

    Attributes:
        dtype: as safetensors writes it, such as `BF16`.
        shape: of the tensor.
        file: name of the shard.
    """

    dtype: str
    shape: tuple[int, ...]
    file: str


def check_file(path: Path) -> None:
    """Refuse a file that is not there, is empty, or holds something that only stands for it.

    Raises:
        ModelError: naming it and how to get it.
    """
    try:
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "is missing"
            if path.is_symlink() and not path.exists():
                what = f"is a link to {path.readlink()}, which is gone"
            raise ModelError(f"{path} {what}: copy or download the model again")
        with path.open("rb") as file:
            start = file.read(len(_LFS)).lower()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from error
    if not start:
        raise ModelError(f"{path} is empty: copy or download it again")
    if start == _LFS:
        raise ModelError(
            f"{path} is a Git LFS pointer, not the file itself: run `git lfs install` and "
            f"`git lfs pull` in {path.parent}, or download the model with `hf download`"
        )
    if start.startswith(_HTML):
        raise ModelError(f"{path} is a page of HTML: the download failed, download it again")


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        ModelError: it cannot be read, is no JSON, or is no object.
    """
    check_file(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_number)
    except ValueError as error:  # of the decoder of UTF-8, too
        raise ModelError(f"{path}: no JSON ({error}); copy or download it again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: holds a JSON {type(content).__name__}, and not an object")
    return content


def _number(word: str) -> float:
    """Take Infinity, which some configs hold; NaN is nobody's intention."""
    if word == "NaN":
        raise ValueError("NaN is no value")
    return float(word)


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that transformers reads, in order of their names.

    Raises:
        ModelError: there are none, it is not clear which, or one that the index names is missing.
    """
    single, index = folder / WEIGHTS, folder / INDEX
    if not index.exists() and not index.is_symlink():
        if not single.exists() and not single.is_symlink():
            raise ModelError(_without_weights(folder))
        return [single]
    names = sorted(set(read_weight_map(index).values()))
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise ModelError(
            f"{folder}: {len(missing)} of {len(names)} files that {INDEX} names are missing: "
            f"{', '.join(missing[:5])}; copy or download them"
        )
    if single.exists() and names != [WEIGHTS]:
        raise ModelError(
            f"{folder} holds {WEIGHTS} and an index of {len(names)} other files, which may be "
            f"another model: remove one, {WEIGHTS} or {INDEX} with its files"
        )
    return [folder / name for name in names]


def read_weight_map(index: Path) -> dict[str, str]:
    """Return which file holds each tensor.

    Raises:
        ModelError: the index is damaged or leads out of its folder.
    """
    content = read_object(index)
    try:
        check_index(content, index)
    except ValueError as error:
        raise ModelError(f"{index}: {error}") from error
    if not isinstance(content.get("metadata"), dict):
        raise ModelError(
            f'{index}: has no metadata, which transformers reads: add "metadata": {{}}'
        )
    return content["weight_map"]


def read_headers(folder: Path) -> dict[str, Header]:
    """Return what every shard says of its tensors; reads no weights.

    Raises:
        ModelError: a shard is missing, cut off or damaged, or two hold the same tensor.
    """
    headers: dict[str, Header] = {}
    for path in weight_files(folder):
        for name, header in _read_header(path).items():
            if name in headers:
                raise ModelError(f"{folder}: {name} is in {headers[name].file} and in {path.name}")
            headers[name] = header
    if (folder / INDEX).exists():
        _compare(read_weight_map(folder / INDEX), headers, folder / INDEX)
    return headers


def _read_header(path: Path) -> dict[str, Header]:
    check_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no dict
            return {
                name: Header(part.get_dtype(), tuple(part.get_shape()), path.name)
                for name, part in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path}: cut off or damaged, it ends after {path.stat().st_size:,} bytes ({error}); "
            "copy or download it again"
        ) from error


def _compare(weight_map: dict[str, str], headers: dict[str, Header], index: Path) -> None:
    """Say where the index is wrong about files that are read as a whole anyway."""
    wrong = [
        name
        for name in sorted(weight_map.keys() | headers.keys())
        if name not in weight_map or (name in headers and weight_map[name] != headers[name].file)
    ]
    if wrong:
        logger.warning(
            "%s does not tell where %d tensors are, such as %s; they are read all the same",
            index, len(wrong), wrong[0],
        )  # fmt: skip


def _without_weights(folder: Path) -> str:
    found = sorted(path.name for path in folder.iterdir() if path.is_file())
    text = f"{folder}: no {WEIGHTS} and no {INDEX}"
    if others := [name for name in found if name.endswith(".safetensors")]:
        return f"{text}, only {', '.join(others[:3])}: name the folder of a whole model"
    if (folder / "manifest.json").is_file():
        return (
            f"{text}: it is a checkpoint in shards; make a model of it first, "
            f"`qwen3-sft export {folder} FOLDER`"
        )
    if gguf := [name for name in found if name.endswith(".gguf")]:
        return f"{text}: {gguf[0]} is for llama.cpp; name a model with safetensors files"
    pickles = [name for name in found if name.endswith(".bin")]
    is_pickle = f"; {pickles[0]} is a pickle, which is not loaded" if pickles else ""
    return (
        f"{folder}: no *.safetensors file{is_pickle}. Convert in Python: AutoModelForCausalLM."
        f"from_pretrained({str(folder)!r}, use_safetensors=False).save_pretrained('NEW'), and "
        "copy the tokenizer's files"
    )

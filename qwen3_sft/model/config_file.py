"""A base model's config.json: read, and held against what a model can be built from."""

from __future__ import annotations

import dataclasses
import difflib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from qwen3_sft.errors import ModelError, told_as
from qwen3_sft.families.family import require
from qwen3_sft.model.base_files import read_object

logger = logging.getLogger(__name__)

CONFIG, GENERATION = "config.json", "generation_config.json"
# What decides shapes; where one is missing, transformers takes that of a model nobody has.
_SIZES = (
    "vocab_size", "hidden_size", "moe_intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "num_experts", "num_experts_per_tok",
)  # fmt: skip
_SAME = {"num_experts": "num_local_experts"}  # its name since transformers 5
_LIKENESS = 0.8


def read_config(folder: Path) -> dict[str, Any]:
    """Return what config.json holds, of a family that is trained.

    Raises:
        ModelError: it is missing, damaged, of another family, or a size in it is missing or wrong.
    """
    path = folder / CONFIG
    if not path.exists() and not path.is_symlink():
        raise ModelError(_without_config(folder))
    config = read_object(path)
    require("train", config.get("model_type"), folder)
    text = config.get("text_config", config)
    if not isinstance(text, dict):
        raise ModelError(f"{path}: text_config is {text!r}, and not an object")
    _check_sizes(text, path, text.get("model_type", config["model_type"]))
    return config


def check_generation(folder: Path) -> None:
    """Refuse a generation_config.json that the export, which copies it, could not use.

    Raises:
        ModelError: naming the file, and the entry if one is at fault.
    """
    path = folder / GENERATION
    if not path.exists() and not path.is_symlink():
        return
    for name, value in read_object(path).items():
        ids = value if isinstance(value, list) else [value]
        if name.endswith("_token_id") and any(type(i) is not int for i in ids if i is not None):
            raise ModelError(f"{path}: {name} is {value!r}, it must be the id of a token")
    wrong = (ValueError, TypeError, AttributeError, OSError)
    with told_as(ModelError, f"{path}: cannot be used", *wrong):
        GenerationConfig.from_pretrained(folder)


def _without_config(folder: Path) -> str:
    text = f"{folder}: no config.json; --model_name_or_path must name a checkpoint"
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        base = read_object(adapter).get("base_model_name_or_path")
        named = f" {base}" if base else ""
        return (
            f"{folder}: a LoRA adapter, not a model: merge it into its base{named} with "
            "`merge_and_unload` of PEFT and name the folder of the result"
        )
    inside = [folder / "model", *sorted(folder.glob("snapshots/*")), *sorted(folder.glob("*/"))]
    if found := next((inner for inner in inside if (inner / CONFIG).is_file()), None):
        return f"{text}, such as {found}"
    gguf = next((file.name for file in sorted(folder.glob("*.gguf"))), None)
    return f"{text}; {gguf} is for llama.cpp" if gguf else text


def _check_sizes(text: Mapping[str, Any], path: Path, model_type: Any) -> None:
    """Refuse sizes that are missing, misspelt, no counts, or do not go together."""
    fields = {field.name for field in dataclasses.fields(CONFIG_MAPPING[model_type])}
    sizes = {}
    for name in (name for name in _SIZES if name in fields):
        given = [key for key in (name, _SAME.get(name)) if key in text]
        if not given:
            raise ModelError(f"{path}: has no {name}{_misspelt(name, text, fields)}; set it")
        sizes[name] = text[given[0]]
        if type(sizes[name]) is not int or sizes[name] < 1:
            raise ModelError(f"{path}: {given[0]} is {sizes[name]!r}, it must be at least 1")
        if len({text[key] for key in given}) > 1:
            told = " and ".join(f"{key} {text[key]}" for key in given)
            raise ModelError(f"{path}: has {told}, which mean the same: remove the wrong one")
    _check_proportions(text, sizes, path)
    for name in sorted(fields - text.keys()):
        if words := _misspelt(name, text, fields):
            logger.warning("%s: has no %s%s, which nothing reads", path, name, words)


def _misspelt(name: str, text: Mapping[str, Any], fields: set[str]) -> str:
    """Return in words which unknown key may be meant, if any is alike."""
    unknown = [key for key in text if key not in fields and key not in _SAME.values()]
    alike = difflib.get_close_matches(name, unknown, n=1, cutoff=_LIKENESS)
    return f" but {alike[0]}" if alike else ""


def _check_proportions(text: Mapping[str, Any], sizes: Mapping[str, int], path: Path) -> None:
    heads, groups = sizes.get("num_attention_heads"), sizes.get("num_key_value_heads")
    width, hidden = text.get("head_dim"), sizes.get("hidden_size")
    problems = {
        f"num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}": (
            heads and groups and heads % groups
        ),
        f"has no head_dim, and hidden_size {hidden} is not a multiple of {heads} heads": (
            not width and heads and hidden and hidden % heads
        ),
        f"num_experts_per_tok {sizes.get('num_experts_per_tok')} is more than there are experts": (
            sizes.get("num_experts_per_tok", 0) > sizes.get("num_experts", 0)
        ),
    }
    for problem, is_there in problems.items():
        if is_there:
            raise ModelError(f"{path}: {problem}")

"""Nothing in a model's folder runs code: what its files may name is held to what is in the folder.

Weights are read from safetensors files alone, classes are transformers' own (`trust_remote_code` is
off everywhere), and kernels come from installed packages, never from the hub.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from qwen3_sft.errors import ModelError


def load_config(folder: Path) -> PretrainedConfig:
    """Read config.json; classes that it brings along are never used.

    Raises:
        ModelError: it asks for code or weights of elsewhere.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    refuse_hub_code(config, folder)
    return config


def refuse_hub_code(config: PretrainedConfig, where: object) -> None:
    """Refuse what a config.json may name and transformers would fetch and run, or load instead.

    `org/repo` as an implementation is a kernel of the hub, which is code
    (`PreTrainedModel._check_and_adjust_attn_implementation`, transformers 5.23).

    Raises:
        ModelError: naming the entry.
    """
    for name in ("attn_implementation", "experts_implementation"):
        value = getattr(config, f"_{name}", None)
        if "/" in str(value):
            raise ModelError(
                f"{where}: config.json sets {name} to {value!r}, a kernel from the hub, which is "
                "code that would run here: remove the entry"
            )
    if weights := getattr(config, "transformers_weights", None):
        raise ModelError(
            f"{where}: config.json names {weights!r} as its weights: remove the entry "
            "transformers_weights, the weights are in model*.safetensors"
        )


def check_weights_files(folder: Path) -> None:
    """Refuse a folder whose weights are not in safetensors files directly in it.

    Raises:
        ModelError: naming the file or entry, and how to convert.
    """
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        found = f"; {pickles[0]} is a pickle, which is not loaded" if pickles else ""
        raise ModelError(
            f"{folder}: no *.safetensors file{found}. Convert in Python: AutoModelForCausalLM."
            f"from_pretrained({str(folder)!r}, use_safetensors=False).save_pretrained('NEW'), and "
            "copy the tokenizer's files"
        )
    for path in folder.glob("*.safetensors.index.json"):
        try:
            check_index(json.loads(path.read_text(encoding="utf-8")), path)
        except ValueError as error:
            raise ModelError(f"{path}: {error}") from error


def check_index(content: Any, path: Path) -> None:
    """Refuse an index of safetensors files that leads out of its folder.

    Raises:
        ValueError: naming the entry.
    """
    files = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(files, dict):
        raise ValueError("has no weight_map")
    for name in files.values():
        if not isinstance(name, str) or not is_plain_name(name):
            raise ValueError(f"has the entry {name!r}, which is no file beside {path.name}")


def is_plain_name(name: str) -> bool:
    """Whether joining `name` to a folder gives something directly in it."""
    return name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}

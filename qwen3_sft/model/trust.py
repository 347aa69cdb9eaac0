"""Nothing in a model's folder runs code: what its files may name is held to what is in the folder.

Weights are read from safetensors files alone, classes are transformers' own (`trust_remote_code` is
off everywhere), and kernels come from installed packages, never from the hub.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig

from qwen3_sft.errors import ModelError

# What transformers raises of values that no model can be built from.
WRONG_VALUES = (
    ValueError, TypeError, KeyError, AttributeError, AssertionError, ArithmeticError, RuntimeError,
)  # fmt: skip


def load_config(folder: Path) -> PretrainedConfig:
    """Read config.json; classes that it brings along are never used.

    Raises:
        ModelError: it asks for code or weights of elsewhere, or a value in it is wrong.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (StrictDataclassError, *WRONG_VALUES) as error:
        words = " ".join(str(error).split())
        raise ModelError(f"{folder / 'config.json'}: {type(error).__name__}: {words}") from error
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

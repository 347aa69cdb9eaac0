"""Quantised base models, which are refused: their codes have no gradients.

Known by config.json, by the files of older tools, or by what the shards' headers say. The last is
what a config that was edited, or belongs to another model, cannot hide.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from qwen3_sft.errors import ModelError
from qwen3_sft.families.family import families
from qwen3_sft.model.base_files import INDEX, Header, read_headers, read_object, read_weight_map

# Of AutoGPTQ, AutoAWQ and NVIDIA's ModelOpt, beside config.json.
FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
_KEYS = ("quantization_config", "quantization", "compression_config")  # the second is MLX's
_TRAINED = ("BF16", "F16", "F32", "F64")
# What the tools call what they keep beside, or instead of, a layer's weight.
_NAMES = re.compile(
    r"\.(weight_scale(_inv|_2)?|input_scale|weight_packed|weight_zero_point|weight_shape|g_idx"
    r"|q(weight|zeros|_weight|_scale|_groups)|scales|zeros|SCB|absmax|quant_map|codebooks|codes"
    r"|trellis|suh|svh|W_q|weight\.(absmax|quant_map|nested_\w+|quant_state\.\w+))$"
    r"|_(blocks|scales)$"
)
_WORDS = {
    "fp8": "FP8", "fbgemm_fp8": "FP8", "gptq": "GPTQ", "awq": "AWQ", "mxfp4": "MXFP4",
    "modelopt": "ModelOpt", "hqq": "HQQ", "exl2": "EXL2", "exl3": "EXL3",
}  # fmt: skip
_MARK = (
    r"fp8|nvfp4|mxfp[48]|gptq|awq|gguf|mlx|bnb|unsloth|exl[23]|hqq|aqlm|eetq|quanto|autoround|"
    r"auto-round|(?:int|uint|fp|nf|q)?[2348]-?bits?|int[348]|nf4|w[48]a(?:8|16)|dynamic|block|"
    r"dwq|quantized|quantised|g(?:32|64|128)|\d\.\d+bpw|[wi]\d+g\d+"
)
_SUFFIX = re.compile(rf"(?:[-_.](?:{_MARK}))+$", re.IGNORECASE)


def refuse_quantised(folder: Path, config: Mapping[str, Any], name: str) -> None:
    """Refuse a quantised model, by what lies in its folder; weights need not be there yet.

    Args:
        folder: of the model.
        config: what config.json holds.
        name: folder or hub id as the user gave it.

    Raises:
        ModelError: how it is quantised, where that stands, and what to use instead.
    """
    if found := next(_in_config(config), None):
        where, method = found
        refusal = _refusal(name, config, method, f"{where} of config.json")
        if _are_plain(folder):  # as merged adapters and weights that were converted back have it
            refusal += f". The weights here are not quantised: if that is right, remove {where}"
        raise ModelError(refusal)
    if legacy := next((file for file in FILES if (folder / file).is_file()), None):
        content = read_object(folder / legacy)
        method = content.get("quant_method") or _legacy_method(legacy, content)
        raise ModelError(_refusal(name, config, str(method), legacy))
    if (folder / INDEX).is_file():
        refuse_quantised_names(read_weight_map(folder / INDEX), config, name)


def refuse_quantised_names(names: Iterable[str], config: Mapping[str, Any], name: str) -> None:
    """Refuse weights that only a quantising tool calls so.

    Raises:
        ModelError: naming the first of them.
    """
    if strange := next((tensor for tensor in names if _NAMES.search(tensor)), None):
        raise ModelError(_refusal(name, config, "", f"the tensor {strange}"))


def refuse_quantised_headers(
    headers: Mapping[str, Header], config: Mapping[str, Any], name: str
) -> None:
    """Refuse weights that are no floating-point numbers of 16 bits or more.

    Raises:
        ModelError: naming the first of them.
    """
    refuse_quantised_names(headers, config, name)
    for tensor, header in headers.items():
        if header.dtype not in _TRAINED:
            where = f"{tensor} in {header.file}, whose elements are {header.dtype}"
            method = "fp8" if header.dtype.startswith("F8") else ""
            raise ModelError(_refusal(name, config, method, where))


def unquantised(name: str, config: Mapping[str, Any]) -> str | None:
    """Return the repository that a quantised one was made from, where its name tells.

    Args:
        name: folder or hub id, such as `someone/Qwen3-30B-A3B-Instruct-2507-AWQ`.
        config: what its config.json holds; older ones name their origin.
    """
    known = [repository for family in families() for repository in family.known_configs]
    for given in (name, str(config.get("_name_or_path", ""))):
        owner, _, last = given.rstrip("/").rpartition("/")
        bare = _SUFFIX.sub("", last)
        for repository in known:
            if bare.lower() == repository.rpartition("/")[2].lower():
                return repository
        if bare != last and owner == "Qwen":
            return f"{owner}/{bare}"
    return None


def _in_config(config: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    """Yield (key, method) of every entry on quantisation, in this config and those within it."""
    for key, value in config.items():
        if key in _KEYS and value:
            is_object = isinstance(value, dict)
            method = value.get("quant_method") or value.get("quant_algo") if is_object else value
            yield f"{path}{key}", str(method or "")
        elif isinstance(value, dict):
            yield from _in_config(value, f"{path}{key}.")


def _legacy_method(file: str, content: Mapping[str, Any]) -> str:
    if file.startswith("hf_"):
        return "modelopt"
    return "gptq" if "desc_act" in content else "awq"


def _refusal(name: str, config: Mapping[str, Any], method: str, where: str) -> str:
    words = f" with {_WORDS.get(method.lower(), method)}" if method else ""
    other = unquantised(name, config)
    instead = (
        f"--model_name_or_path {other}"
        if other
        else ("the model that it was made from, whose weights are bfloat16, float16 or float32")
    )
    return (
        f"{name}: quantised{words}, as {where} says, and quantised weights cannot be trained: use "
        f"{instead}"
    )


def _are_plain(folder: Path) -> bool:
    """Whether the weights are here and are floating-point numbers all the same."""
    if not any(folder.glob("*.safetensors")):
        return False
    headers = read_headers(folder)
    return all(h.dtype in _TRAINED and not _NAMES.search(name) for name, h in headers.items())

"""Keys of a model's JSON files under the names that transformers 4 and other readers look for.

transformers 5 renamed some keys, and what looks for the old name takes its default without a word:
`rope_theta` 10,000, no yarn and 128 experts in transformers 4.57.3, whose tokenizer stops at a list
in `extra_special_tokens`. The old names are written beside the new ones, with the meaning that
4.57.3 gives them; transformers 5.23 reads both, and the same values from either.

Compared: the config classes of both versions for Qwen3-MoE, Qwen3-VL-MoE and Qwen3-Next. What else
4.57.3 has and 5.23 has not are options of generation, which lie in generation_config.json.
"""

from __future__ import annotations

from typing import Any

# Those that transformers 4.57.3 computes; others mean nothing to it.
_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
# Beside the scaling in transformers 4, within the one dictionary in transformers 5.
_BESIDE_SCALING = ("rope_theta", "partial_rotary_factor")
# The class that transformers 5 writes for a tokenizer that is nothing but its tokenizer.json.
_NEW_TOKENIZER, _OLD_TOKENIZER = "TokenizersBackend", "PreTrainedTokenizerFast"


def with_older_keys(config: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a config.json with the older names beside the newer ones.

    Args:
        config: as transformers 5 writes it; the configs within it (`text_config`) are changed too.
    """
    both = {key: _nested(key, value) for key, value in config.items()}
    if isinstance(config.get("rope_parameters"), dict):
        both |= _older_rope(config["rope_parameters"])
    for name, other in (("num_experts", "num_local_experts"), ("num_local_experts", "num_experts")):
        if config.get(name) is not None:
            both.setdefault(other, config[name])
    if config.get("dtype") is not None:
        both["torch_dtype"] = config["dtype"]
    width, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if width and heads and "rope_parameters" in config:  # a decoder; mlx-lm has no default for it
        both.setdefault("head_dim", width // heads)
    return both


def with_older_tokenizer_keys(config: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a tokenizer_config.json in the words of transformers 4.

    Added tokens stand in tokenizer.json, whoever wrote it.
    """
    older = dict(config)
    if isinstance(config.get("extra_special_tokens"), list):
        older["additional_special_tokens"] = older.pop("extra_special_tokens")
    if config.get("tokenizer_class") == _NEW_TOKENIZER:
        older["tokenizer_class"] = _OLD_TOKENIZER
    return older


def _nested(key: str, value: Any) -> Any:
    is_config = isinstance(value, dict) and key.endswith("_config") and key != "quantization_config"
    return with_older_keys(value) if is_config else value


def _older_rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return `rope_theta`, `rope_scaling` and what stands beside them.

    Parameters for each type of layer have no form in transformers 4; nothing is written for them.
    """
    kind = parameters.get("rope_type", "default")
    if "rope_theta" not in parameters or kind not in _ROPE_TYPES:
        return {}
    scaling = {key: value for key, value in parameters.items() if key not in _BESIDE_SCALING}
    beside = {key: parameters[key] for key in _BESIDE_SCALING if key in parameters}
    return {**beside, "rope_scaling": None if scaling.keys() <= {"rope_type"} else scaling}

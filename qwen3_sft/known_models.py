"""Configurations of released models, so that planning needs no network.

Source: config.json of the hub repositories named. Only what differs from Qwen3MoeConfig's defaults
in transformers 5.23 or decides sizes is listed.
"""

from __future__ import annotations

from typing import Any

_30B_A3B: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
}

KNOWN_CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-30B-A3B": _30B_A3B,
    "Qwen/Qwen3-30B-A3B-Base": _30B_A3B,
    "Qwen/Qwen3-30B-A3B-Instruct-2507": _30B_A3B,
    "Qwen/Qwen3-30B-A3B-Thinking-2507": _30B_A3B,
}

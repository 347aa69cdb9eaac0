"""Configurations of released Qwen3-MoE models, so that planning needs no network.

Source: config.json of the hub repositories named. Only what decides sizes is listed, where it
differs from transformers 5.23's defaults or where those could change; rotary bases and lengths are
not, so a model to train is never built from these. The instruct, thinking and coder models of a
size differ from its first release in nothing that is listed here.
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
_235B_A22B: dict[str, Any] = _30B_A3B | {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 94,
    "num_attention_heads": 64,
}
KNOWN_CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-30B-A3B": _30B_A3B,
    "Qwen/Qwen3-30B-A3B-Base": _30B_A3B,
    "Qwen/Qwen3-30B-A3B-Instruct-2507": _30B_A3B,
    "Qwen/Qwen3-30B-A3B-Thinking-2507": _30B_A3B,
    # Its unused dense width is 5,472: no layer is dense.
    "Qwen/Qwen3-Coder-30B-A3B-Instruct": _30B_A3B | {"intermediate_size": 5472},
    "Qwen/Qwen3-235B-A22B": _235B_A22B,
    "Qwen/Qwen3-235B-A22B-Instruct-2507": _235B_A22B,
    "Qwen/Qwen3-235B-A22B-Thinking-2507": _235B_A22B,
}

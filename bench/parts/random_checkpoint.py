"""A random Qwen3-MoE checkpoint as the hub has them: a tensor per expert's matrix, several files.

Qwen3-30B-A3B made narrower and shallower, so that it fits into a gigabyte, with its proportions:
128 experts in a layer, 8 query heads per key-value head, F = 3/8 D, vocabulary and attention with
about their share of the weights. One proportion cannot be kept: with 6 layers instead of 48 the
largest tensor, the fused gate and up projections of one layer, is 11% of the model instead of 1.3%.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3MoeConfig

from qwen3_sft.checkpoints.hub_writer import HubWriter
from qwen3_sft.families.known_models import KNOWN_CONFIGS
from qwen3_sft.model.meta_model import model_on_meta

FILE_BYTES = 200 * 10**6
SIZES: dict[str, dict[str, int]] = {
    "1gb": {
        "vocab_size": 8192, "hidden_size": 768, "moe_intermediate_size": 288,
        "num_hidden_layers": 6, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 96,
    },
    "tiny": {
        "vocab_size": 512, "hidden_size": 64, "moe_intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 16,
        "num_experts": 16,
    },
}  # fmt: skip


def config_of(size: str) -> Qwen3MoeConfig:
    """Return the configuration of one of `SIZES`."""
    values: dict[str, Any] = {**KNOWN_CONFIGS["Qwen/Qwen3-30B-A3B"], **SIZES[size]}
    return Qwen3MoeConfig(**values)


def make_checkpoint(folder: Path, size: str) -> None:
    """Write the checkpoint in bfloat16 unless it is there.

    Args:
        folder: for checkpoints; each size gets a folder of its own in it.
        size: one of `SIZES`.
    """
    model, target = model_on_meta(config_of(size)), folder / size
    if (target / "config.json").is_file():  # written last
        return
    target.mkdir(parents=True, exist_ok=True)
    writer = HubWriter(model, target, torch.bfloat16, FILE_BYTES)
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.state_dict().items():
        values = torch.empty(weight.shape, dtype=torch.bfloat16)
        writer.add(name, values.normal_(std=0.02, generator=generator))
    writer.close()
    values = {**model.config.to_dict(), "architectures": ["Qwen3MoeForCausalLM"]}
    (target / "config.json").write_text(json.dumps(values, indent=1), encoding="utf-8")

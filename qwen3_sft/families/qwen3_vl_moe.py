"""Qwen3-VL-MoE: the decoder of Qwen3-MoE behind a vision tower. Not trained yet."""

from __future__ import annotations

from typing import Any

from monkey_patch.architectures import QWEN3_VL_MOE
from qwen3_sft.families.family import Family
from qwen3_sft.families.flops import ModelFlops, num_parameters
from qwen3_sft.families.known_models import KNOWN_CONFIGS

_TEXT = KNOWN_CONFIGS["Qwen/Qwen3-30B-A3B"]
# The same decoder, whose router always renormalises.
_30B_A3B: dict[str, Any] = {
    "text_config": {name: _TEXT[name] for name in _TEXT if name != "norm_topk_prob"},
    "vision_config": {
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_heads": 16,
        "out_hidden_size": 2048,
        "patch_size": 16,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [8, 16, 24],
    },
    "tie_word_embeddings": False,
}

FAMILY = Family(
    name="Qwen3-VL-MoE",
    model_types=("qwen3_vl_moe", "qwen3_vl_moe_text"),
    architecture=QWEN3_VL_MOE,
    capabilities={
        "train": "Qwen3-VL-MoE is a vision-language model, and images are not trained on yet: use "
        "a Qwen3-MoE such as Qwen/Qwen3-30B-A3B-Instruct-2507"
    },
    auto_class="AutoModelForImageTextToText",
    hub_names=("Qwen/Qwen3-VL-30B-A3B-*", "Qwen/Qwen3-VL-235B-A22B-*"),
    known_configs={
        "Qwen/Qwen3-VL-30B-A3B-Instruct": _30B_A3B,
        "Qwen/Qwen3-VL-30B-A3B-Thinking": _30B_A3B,
    },
    count_flops=ModelFlops.from_config,
    count_parameters=num_parameters,
)

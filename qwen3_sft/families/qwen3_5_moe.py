"""Qwen3.5-MoE and Qwen3.6-MoE: gated delta nets, and a vision tower. Not trained yet."""

from __future__ import annotations

from monkey_patch.architectures import QWEN3_5_MOE
from qwen3_sft.families.family import Family

FAMILY = Family(
    name="Qwen3.5-MoE",
    model_types=("qwen3_5_moe", "qwen3_5_moe_text"),
    architecture=QWEN3_5_MOE,
    capabilities={
        "train": "Qwen3.5-MoE has gated delta nets, through which packed documents would leak into "
        "one another, and a vision tower, and is not trained yet: use a Qwen3-MoE such as "
        "Qwen/Qwen3-30B-A3B-Instruct-2507"
    },
    auto_class="AutoModelForImageTextToText",
    hub_names=("Qwen/Qwen3.[56]-*-A*B*",),
)

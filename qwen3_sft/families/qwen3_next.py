"""Qwen3-Next: three of four layers are gated delta nets. Not trained yet."""

from __future__ import annotations

from monkey_patch.architectures import QWEN3_NEXT
from qwen3_sft.families.family import Family

FAMILY = Family(
    name="Qwen3-Next",
    model_types=("qwen3_next",),
    architecture=QWEN3_NEXT,
    capabilities={
        "train": "Qwen3-Next has gated delta nets, through which packed documents would leak into "
        "one another, and is not trained yet: use a Qwen3-MoE such as "
        "Qwen/Qwen3-30B-A3B-Instruct-2507"
    },
    hub_names=("Qwen/Qwen3-Next-80B-A3B-*",),
)

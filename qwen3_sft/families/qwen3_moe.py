"""Qwen3-MoE: text models with softmax attention and a mixture of experts in every layer."""

from __future__ import annotations

from monkey_patch.architectures import QWEN3_MOE
from qwen3_sft.families.family import SUPPORTED, Family
from qwen3_sft.families.flops import ModelFlops, num_parameters
from qwen3_sft.families.known_models import KNOWN_CONFIGS

FAMILY = Family(
    name="Qwen3-MoE",
    model_types=("qwen3_moe",),
    architecture=QWEN3_MOE,
    capabilities={"train": SUPPORTED},
    hub_names=tuple(KNOWN_CONFIGS),
    known_configs=KNOWN_CONFIGS,
    chat_formats=(
        "qwen3", "qwen3_instruct_2507", "qwen3_thinking_2507", "qwen3_coder", "qwen3_coder_tools",
    ),
    count_flops=ModelFlops.from_config,
    count_parameters=num_parameters,
)  # fmt: skip

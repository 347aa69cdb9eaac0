"""A family nobody has: Qwen3-MoE's computation under names that no rule could guess.

The tests lay this one file into `qwen3_sft/families/`, as somebody would who adds a family.
"""

from __future__ import annotations

from monkey_patch.architectures import Architecture
from qwen3_sft.families.family import SUPPORTED, Family
from qwen3_sft.families.flops import ModelFlops, num_parameters

FAMILY = Family(
    name="Made-up",
    model_types=("made_up",),
    architecture=Architecture(
        model_types=("made_up",),
        layers=("MadeUpStage",),
        blocks=("MadeUpMixture",),
        experts=("MadeUpSpecialists",),
        routers=("MadeUpSwitch",),
        decoders=("MadeUpTower",),
        causal_lms=("MadeUpWriter",),
        fp8_keep=("*.k_proj",),
    ),
    capabilities={"train": SUPPORTED},
    known_configs={"Nobody/Made-up": {"num_hidden_layers": 5, "hidden_size": 64}},
    chat_formats=("qwen3",),
    count_flops=ModelFlops.from_config,
    count_parameters=num_parameters,
)

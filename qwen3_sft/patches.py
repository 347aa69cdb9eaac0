"""Options -> the patches a run applies."""

from __future__ import annotations

from qwen3_sft.args import EXPERT_PATCHES, ModelArguments


def choose_patches(options: ModelArguments, attention: str) -> list[str]:
    """Return the names of `monkey_patch.PATCHES` to apply, in their order.

    Args:
        options: `experts_implementation` decides on the first.
        attention: what `choose_attention` chose.
    """
    names = []
    if options.experts_implementation in EXPERT_PATCHES:
        names.append(options.experts_implementation)
    if attention == "torch_varlen":
        names.append("varlen_attention")
    return [*names, "router_aux_loss", "linear_cross_entropy"]

"""Options -> the patches a run applies."""

from __future__ import annotations

from torch import nn

from monkey_patch.core import Patch
from monkey_patch.experts_fp8 import experts_fp8
from monkey_patch.fp8_selection import Selection, select
from monkey_patch.linear_fp8 import linear_fp8
from qwen3_sft.model.attention_trial import VARLEN
from qwen3_sft.model.fp8 import NO_FP8, Fp8Choice
from qwen3_sft.options.model_args import EXPERT_PATCHES, ModelArguments

# Those that multiply in FP8, by name.
FP8_PATCHES = ("experts_fp8", "experts_fp8_recompute", "linear_fp8")


def choose_patches(
    options: ModelArguments, attention: str, fp8: Fp8Choice = NO_FP8
) -> list[Patch | str]:
    """Return the patches to apply, by name where they have no settings.

    Args:
        options: `experts_implementation` decides on the first.
        attention: what `choose_attention` chose.
        fp8: what `choose_fp8` chose.
    """
    patches: list[Patch | str] = []
    experts = options.experts_implementation
    if fp8.experts:
        recomputes = experts == "scatter_moe_recompute"
        patches.append(
            experts_fp8(options.fp8_keep, options.fp8_scaling, recompute_hidden=recomputes)
        )
    elif experts in EXPERT_PATCHES:
        patches.append(experts)
    if attention in VARLEN:
        patches.append("varlen_attention")
    patches += ["router_aux_loss", "linear_cross_entropy"]
    if fp8.attention:
        patches.append(linear_fp8(options.fp8_keep, options.fp8_recipe))
    return patches


def fp8_selection(model: nn.Module, options: ModelArguments, fp8: Fp8Choice) -> Selection | None:
    """Return which modules compute in FP8 and which do not; None where nothing does.

    Raises:
        PatchError: nothing is left to convert, or a pattern to keep matches nothing.
    """
    if not fp8:
        return None
    return select(model, attention=fp8.attention, experts=fp8.experts, keep=options.fp8_keep)

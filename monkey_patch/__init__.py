"""Reversible changes to a loaded Hugging Face model, one per file, and the kernels behind them.

    applied = monkey_patch.apply_patches(model, ["scatter_moe", "linear_cross_entropy"])
    ...
    applied.revert()

Apply before wrapping the model for LoRA, sharding or compilation; importing changes nothing. Which
patches a run gets is decided in `qwen3_sft/model/patches.py`, and nothing here imports `qwen3_sft`.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from monkey_patch.core import (
    AppliedPatches,
    Patch,
    PatchError,
    Replacement,
    apply_plans,
    checked_plans,
)
from monkey_patch.experts_fp8 import EXPERTS_FP8
from monkey_patch.linear_cross_entropy import LINEAR_CROSS_ENTROPY
from monkey_patch.linear_fp8 import LINEAR_FP8
from monkey_patch.router_aux_loss import ROUTER_AUX_LOSS, RouterStatistics, router_statistics
from monkey_patch.scatter_moe import SCATTER_MOE, SCATTER_MOE_RECOMPUTE
from monkey_patch.varlen_attention import VARLEN_ATTENTION

__all__ = [
    "PATCHES",
    "AppliedPatches",
    "Patch",
    "PatchError",
    "Replacement",
    "RouterStatistics",
    "apply_patches",
    "check_patches",
    "router_statistics",
]

PATCHES = (
    SCATTER_MOE,
    SCATTER_MOE_RECOMPUTE,
    EXPERTS_FP8,
    VARLEN_ATTENTION,
    LINEAR_CROSS_ENTROPY,
    ROUTER_AUX_LOSS,
    LINEAR_FP8,
)


def apply_patches(model: nn.Module, patches: Iterable[Patch | str]) -> AppliedPatches:
    """Apply patches, all or none, and return the handle that reverts them.

    Args:
        model: a loaded Hugging Face model, or any module that contains one.
        patches: entries of `PATCHES`, their names, or patches of your own.

    Raises:
        PatchError: unknown name, unmet requirement, unsuitable model, conflict, or applied twice.
    """
    return apply_plans(model, _chosen(patches))


def check_patches(model: nn.Module, patches: Iterable[Patch | str]) -> None:
    """Refuse what `apply_patches` would refuse, and change nothing; the model may be on meta.

    Args:
        model: as for `apply_patches`.
        patches: likewise.

    Raises:
        PatchError: as `apply_patches`.
    """
    checked_plans(model, _chosen(patches))


def _chosen(patches: Iterable[Patch | str]) -> list[Patch]:
    by_name = {patch.name: patch for patch in PATCHES}
    chosen = []
    for patch in patches:
        if isinstance(patch, str) and patch not in by_name:
            raise PatchError(f"unknown patch {patch!r}; there are {', '.join(by_name)}")
        chosen.append(by_name[patch] if isinstance(patch, str) else patch)
    return chosen

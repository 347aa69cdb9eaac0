"""Run the experts of a mixture-of-experts model in FP8, layer by layer where that was chosen.

The hook is the one of `scatter_moe`, transformers' experts registry, under two more names:
`scatter_moe_fp8` and `scatter_moe_fp8_recompute`. The config names one for the whole model, so the
choice of a layer stands on the experts module itself: with the attribute `fp8_scaling` it
multiplies in FP8, without it in the dtype of its inputs, as under `scatter_moe`. Parameters, their
dtype and the state dict stay: weights are quantised anew in every pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import torch
from torch import nn

from monkey_patch.core import Patch, PatchError, Replacement
from monkey_patch.fp8_selection import select
from monkey_patch.kernels.fp8_device import require_fp8_products
from monkey_patch.kernels.scatter_moe.quantize import Scaling
from monkey_patch.scatter_moe import SCATTER_MOE, experts_forward
from monkey_patch.scatter_moe import plan as plan_scatter_moe

NAME = "experts_fp8"
RECOMPUTE_NAME = "experts_fp8_recompute"
IMPLEMENTATION = "scatter_moe_fp8"
RECOMPUTE_IMPLEMENTATION = "scatter_moe_fp8_recompute"


class ExpertsScaling:
    """The attribute `fp8_scaling` of one experts module, None where it has none.

    The patch engine replaces what is there; an experts module has no such attribute until then.
    """

    def __init__(self, experts: nn.Module):
        self.experts = experts

    @property
    def fp8_scaling(self) -> Scaling | None:
        """The scaling that the module multiplies with; None: not in FP8."""
        return vars(self.experts).get("fp8_scaling")

    @fp8_scaling.setter
    def fp8_scaling(self, scaling: Scaling | None) -> None:
        """Set it; None takes it away."""
        if scaling is None:
            vars(self.experts).pop("fp8_scaling", None)
        else:
            vars(self.experts)["fp8_scaling"] = scaling


def experts_fp8_forward(
    experts: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    recompute_hidden: bool = False,
) -> torch.Tensor:
    """Compute an experts module's output, in FP8 if it has the attribute `fp8_scaling`.

    Args, errors: as of `scatter_moe.experts_forward`.
    """
    return experts_forward(
        experts, hidden_states, top_k_index, top_k_weights,
        recompute_hidden=recompute_hidden, fp8=getattr(experts, "fp8_scaling", "off"),
    )  # fmt: skip


def register() -> None:
    """Make both names known to `experts_implementation=`."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    recompute = partial(experts_fp8_forward, recompute_hidden=True)
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_fp8_forward)
    ALL_EXPERTS_FUNCTIONS.register(RECOMPUTE_IMPLEMENTATION, recompute)


def plan(
    model: nn.Module, keep: Sequence[str], scaling: Scaling, implementation: str
) -> Iterator[Replacement]:
    """Yield the config's experts implementation, and the scaling of each module that converts."""
    yield from plan_scatter_moe(model, implementation)
    for name in select(model, attention=False, experts=True, keep=keep).converted:
        experts = model.get_submodule(name)
        _check_device(experts, scaling)
        yield Replacement(ExpertsScaling(experts), "fp8_scaling", scaling, name)


def _check_device(experts: Any, scaling: Scaling) -> None:
    device = experts.gate_up_proj.device
    if device.type != "cuda":
        return
    try:
        require_fp8_products(
            torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device), scaling
        )
    except ValueError as error:
        raise PatchError(f"patch {NAME!r}: {error}") from error


def experts_fp8(
    keep: Sequence[str] = (), scaling: Scaling = "blockwise", *, recompute_hidden: bool = False
) -> Patch:
    """Return the patch that runs the experts in FP8 outside of the first and last decoder layer.

    Args:
        keep: patterns of module names that stay as they are, as in `fp8_selection.select`.
        scaling: which values share a scale, as in `kernels.scatter_moe.quantize`.
        recompute_hidden: as in `kernels.scatter_moe`, in every layer.

    Raises:
        PatchError: an unknown scaling.
    """
    if scaling not in get_args(Scaling):
        raise PatchError(f"unknown scaling {scaling!r}; there are {', '.join(get_args(Scaling))}")
    implementation = RECOMPUTE_IMPLEMENTATION if recompute_hidden else IMPLEMENTATION
    return replace(
        EXPERTS_FP8,
        name=RECOMPUTE_NAME if recompute_hidden else NAME,
        plan=partial(plan, keep=tuple(keep), scaling=scaling, implementation=implementation),
    )


EXPERTS_FP8 = replace(
    SCATTER_MOE,
    name=NAME,
    summary="experts as fused grouped products in FP8, except in the first and the last layer",
    plan=partial(plan, keep=(), scaling="blockwise", implementation=IMPLEMENTATION),
    # Each product is off by 4 percent (tests/monkey_patch/kernels/test_scatter_moe_fp8.py), and
    # routers above choose other experts for a few tokens.
    tolerance=0.2,
    register=register,
)

"""Compile all kernels of a block side by side before the first of them runs."""

from __future__ import annotations

import logging

import torch

from monkey_patch.kernels.aot import compile_all
from monkey_patch.kernels.scatter_moe.quantize import E4M3, Fp8
from monkey_patch.kernels.scatter_moe.triton.catalogue import Shape, launches
from monkey_patch.kernels.scatter_moe.triton.tiles import (
    FP8_STAGES,
    STAGES,
    architecture_of,
    choose_tiles,
)

logger = logging.getLogger(__name__)

_ready: set[tuple[object, ...]] = set()


def warm_up(
    x_TD: torch.Tensor,
    down_proj_EDF: torch.Tensor,
    top_k: int,
    *,
    recompute_hidden: bool,
    fp8: Fp8 = "off",
) -> None:
    """Compile what a block needs for its forward and backward pass, once per shape and device.

    One after the other, at their first launches, they would take several times as long, without a
    word. Triton keeps the binaries in its cache folder (TRITON_CACHE_DIR) for the next process.

    Args:
        x_TD: (T, D) on a CUDA device.
        down_proj_EDF: (E, D, F).
        top_k: K.
        recompute_hidden: whether the backward pass runs the first product again.
        fp8: scaling of the operands of the products with a weight.
    """
    experts, hidden, intermediate = down_proj_EDF.shape
    shape = Shape(len(x_TD), top_k, experts, hidden, intermediate)
    architecture, rows = architecture_of(x_TD), len(x_TD) * top_k // experts
    dtypes = dict.fromkeys(STAGES, x_TD.dtype)
    if fp8 != "off":
        dtypes |= dict.fromkeys(FP8_STAGES, E4M3)
    scaling = () if fp8 == "off" else (fp8,)
    cuts = {s: choose_tiles(s, architecture, dtypes[s], rows, *scaling) for s in STAGES}
    facts = (x_TD.device, x_TD.dtype, down_proj_EDF.dtype, shape[1:], recompute_hidden, fp8)
    key = (*facts, *cuts.values())
    if key in _ready:
        return
    _ready.add(key)
    stages = launches(
        shape, cuts.__getitem__, x_TD.dtype, down_proj_EDF.dtype,
        recompute_hidden=recompute_hidden, fp8=fp8,
    )  # fmt: skip
    found = [launch for stage in stages.values() for launch in stage]
    device = torch.cuda.get_device_name(x_TD.device)
    logger.info("scatter_moe: preparing %d kernels for %s ...", len(found), device)
    with torch.cuda.device_of(x_TD):
        logger.info("scatter_moe: kernels ready after %.1f s", compile_all(found))

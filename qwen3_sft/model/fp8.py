"""What `--fp8` means for one run: which halves, on which device, and why.

`auto` follows a table of measurements (`fp8_measured.json`, written by `bench/fp8.py`): a half runs
in FP8 on a device where that was faster than BF16, and stays in BF16 elsewhere. The experts count
with the scaling that the run asks for: `experts` in the table is blockwise, `experts_mxfp8` that.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from monkey_patch.kernels.fp8_device import FP8_SINCE, MXFP8_SINCE
from qwen3_sft.errors import UsageError
from qwen3_sft.hardware import find_device
from qwen3_sft.options.model_args import EXPERT_PATCHES, ModelArguments

logger = logging.getLogger(__name__)

# The column of the table beside `experts`, where a device takes mxfp8.
MXFP8_EXPERTS = "experts_mxfp8"
TABLE = Path(__file__).with_name("fp8_measured.json")


@dataclass(frozen=True)
class Fp8Choice:
    """The halves of a layer that run in FP8.

    Attributes:
        attention: the projections of attention.
        experts: the products of the experts.
    """

    attention: bool = False
    experts: bool = False

    def __bool__(self) -> bool:
        """Whether anything does."""
        return self.attention or self.experts


NO_FP8 = Fp8Choice()


def choose_fp8(
    options: ModelArguments,
    device: torch.device,
    *,
    packing: bool,
    measured: Mapping[str, Any] | None = None,
) -> Fp8Choice:
    """Return what runs in FP8.

    Args:
        options: `fp8`, its scaling and the experts implementation.
        device: what the run computes on; a CPU emulates, exactly and slowly.
        packing: whether rows hold several documents.
        measured: the table for `auto`; the shipped one by default.

    Raises:
        UsageError: the device has no FP8, or none with such scales, other experts than ours
            compute, or a scale would be shared by documents that must not see each other.
    """
    if options.fp8 == "off":
        if options.fp8_keep:
            raise UsageError(f"--fp8_keep {options.fp8_keep} without --fp8 does nothing")
        return NO_FP8
    if options.fp8 == "auto":
        table = _table() if measured is None else measured
        choice = _measured_choice(device, table, options.fp8_scaling)
    else:
        choice = Fp8Choice(options.fp8 in ("attention", "all"), options.fp8 in ("experts", "all"))
    if not choice:
        return choice
    if choice.experts and options.experts_implementation not in EXPERT_PATCHES:
        raise UsageError(
            f"--fp8 {options.fp8} with --experts_implementation {options.experts_implementation}: "
            "only scatter_moe has FP8 products; set --fp8 attention or scatter_moe"
        )
    if choice.attention and options.fp8_recipe == "tensorwise" and packing:
        raise UsageError(
            "--fp8_recipe tensorwise has one scale for all tokens of a row, through which packed "
            "documents change each other's results: set rowwise, or --packing false"
        )
    if device.type == "cpu":
        logger.warning("FP8 is emulated on a CPU: the numbers of a GPU, and slower than without")
    else:
        name, capability = torch.cuda.get_device_name(device), _capability(device)
        if problem := device_problem(capability, options.fp8_scaling if choice.experts else ""):
            raise UsageError(f"--fp8 {options.fp8}: {name} is {problem}")
    return choice


def device_problem(capability: tuple[int, int], scaling: str = "") -> str | None:
    """Return why a CUDA device does not multiply in FP8, or None if it does.

    Args:
        capability: of the device, such as (9, 0).
        scaling: of the experts, if they are to run in FP8.
    """
    name = f"sm_{capability[0]}{capability[1]}"
    if capability < FP8_SINCE:
        return f"{name} and FP8 begins with sm_89 (Ada, Hopper, Blackwell); leave it out"
    if scaling == "mxfp8" and capability < MXFP8_SINCE:
        return f"{name} and mxfp8 begins with sm_100 (Blackwell); set --fp8_scaling blockwise"
    return None


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _measured_choice(device: torch.device, measured: Mapping[str, Any], scaling: str) -> Fp8Choice:
    """Follow the table; a device that is not in it stays in BF16."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    spec = find_device(name)
    row = measured.get(spec.name if spec else name)
    if row is None:
        logger.info("FP8: off, nothing is measured on %s yet (--fp8 auto)", name)
        return NO_FP8
    key, other = "experts", MXFP8_EXPERTS
    if scaling == "mxfp8":
        key, other = other, key
    # A scaling that nobody has timed here is no gain.
    experts = row.get(key, 0.0)
    logger.info(
        "FP8 over BF16 on %s: attention x %.2f, %s x %.2f (%s)", name, row["attention"],
        key, experts, row["source"],
    )  # fmt: skip
    if row.get(other, 0.0) > max(experts, 1):
        better = "blockwise" if other == "experts" else "mxfp8"
        logger.info("--fp8_scaling %s was faster here: x %.2f", better, row[other])
    return Fp8Choice(row["attention"] > 1, experts > 1)


def _table() -> dict[str, Any]:
    return json.loads(TABLE.read_text(encoding="utf-8"))

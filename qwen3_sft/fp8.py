"""What `--fp8` means for one run: which halves, on which device, and why.

`auto` follows a table of measurements (`fp8_measured.json`, written by `bench/fp8.py`): a half runs
in FP8 on a device where that was faster than BF16, and stays in BF16 elsewhere.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qwen3_sft.args import EXPERT_PATCHES, ModelArguments
from qwen3_sft.hardware import find_device
from qwen3_sft.recipe import UsageError

logger = logging.getLogger(__name__)

TABLE = Path(__file__).with_name("fp8_measured.json")
_OLDEST = (8, 9)


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


def choose_fp8(
    options: ModelArguments,
    device: torch.device,
    *,
    packing: bool,
    measured: Mapping[str, Any] | None = None,
) -> Fp8Choice:
    """Return what runs in FP8.

    Args:
        options: `fp8` and the experts implementation.
        device: what the run computes on; a CPU emulates, exactly and slowly.
        packing: whether rows hold several documents.
        measured: the table for `auto`; the shipped one by default.

    Raises:
        UsageError: the device has no FP8, other experts than ours compute, or a scale would be
            shared by documents that must not see each other.
    """
    if options.fp8 == "off":
        if options.fp8_keep:
            raise UsageError(f"--fp8_keep {options.fp8_keep} without --fp8 does nothing")
        return Fp8Choice()
    if options.fp8 == "auto":
        choice = _measured_choice(device, _table() if measured is None else measured)
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
    _check_device(device, options.fp8)
    return choice


def _check_device(device: torch.device, wanted: str) -> None:
    if device.type == "cpu":
        logger.warning("FP8 is emulated on a CPU: the numbers of a GPU, and slower than without")
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST:
        raise UsageError(
            f"--fp8 {wanted}: {torch.cuda.get_device_name(device)} is sm_{capability[0]}"
            f"{capability[1]} and FP8 begins with sm_89 (Ada, Hopper, Blackwell); leave it out"
        )


def _measured_choice(device: torch.device, measured: Mapping[str, Any]) -> Fp8Choice:
    """Follow the table; a device that is not in it stays in BF16."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    spec = find_device(name)
    row = measured.get(spec.name if spec else name)
    if row is None:
        logger.info("FP8: off, nothing is measured on %s yet (--fp8 auto)", name)
        return Fp8Choice()
    choice = Fp8Choice(row["attention"] > 1, row["experts"] > 1)
    logger.info(
        "FP8 over BF16 on %s: attention x %.2f, experts x %.2f (%s)", name, row["attention"],
        row["experts"], row["source"],
    )  # fmt: skip
    return choice


def _table() -> dict[str, Any]:
    return json.loads(TABLE.read_text(encoding="utf-8"))

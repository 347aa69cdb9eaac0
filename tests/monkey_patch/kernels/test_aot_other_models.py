"""Kernels of larger models than Qwen3-30B-A3B that have spilled, compiled without a GPU.

Only what had to be mended; `test_aot_experts` compiles everything at the size of the 30B.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pytest
import torch

from monkey_patch.kernels import aot
from monkey_patch.kernels.launch import Launch
from monkey_patch.kernels.scatter_moe.routing import Routing
from monkey_patch.kernels.scatter_moe.triton import catalogue, routing
from monkey_patch.kernels.scatter_moe.triton.tiles import shipped_table
from tests.support.compiler import run_compiling

pytestmark = [pytest.mark.kernel, pytest.mark.slow]

NEXT_EXPERTS = 512  # of Qwen3-Next-80B-A3B
CODER_480B = catalogue.Shape(8192, 8, 160, 6144, 2560)


def cases() -> Iterator[tuple[str, Launch]]:
    def integers(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device="meta")

    slots = integers(65536)
    routed = Routing(integers(NEXT_EXPERTS + 1), slots, slots)
    for target in ("sm_90", "sm_100"):
        yield target, routing.tile_launch(routed, 128, integers(3, 1024))
    table = shipped_table()
    cuts = {stage: rows[0][1] for stage, rows in table.get("sm_100", table["default"]).items()}
    by_stage = catalogue.launches(CODER_480B, cuts.__getitem__, weight_dtype=torch.float32)
    yield from (("sm_100", launch) for launch in by_stage["weight_gradient"])


def compile_all() -> Any:
    return [asdict(aot.compile_ahead(launch, target)) for target, launch in cases()]


def test_nothing_spills(tmp_path):
    module = "tests.monkey_patch.kernels.test_aot_other_models"
    compiled = json.loads(run_compiling("-m", module, cache=tmp_path))
    assert len(compiled) == 4
    for one in compiled:
        assert one["spill_bytes"] == one["spill_stores"] == one["spill_loads"] == 0, one


if __name__ == "__main__":
    print(json.dumps(compile_all()))  # noqa: T201

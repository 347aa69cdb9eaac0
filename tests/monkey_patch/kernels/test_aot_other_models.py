"""Kernels at the sizes of other models than Qwen3-30B-A3B, compiled without a GPU.

By default what had to be mended; `test_aot_experts` compiles everything at the size of the 30B.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from monkey_patch.kernels import aot
from monkey_patch.kernels.launch import Launch
from monkey_patch.kernels.scatter_moe.routing import Routing
from monkey_patch.kernels.scatter_moe.triton import catalogue, routing
from monkey_patch.kernels.scatter_moe.triton.tiles import STAGES, shipped_table
from tests.monkey_patch.kernels.test_aot_experts import different_cuts
from tests.support.compiler import run_compiling

pytestmark = [pytest.mark.kernel, pytest.mark.slow]

NEXT_EXPERTS = 512  # of Qwen3-Next-80B-A3B
CODER_480B = catalogue.Shape(8192, 8, 160, 6144, 2560)
SHAPES = (
    catalogue.Shape(8192, 8, 128, 4096, 1536),  # Qwen3-235B-A22B
    CODER_480B,
    catalogue.Shape(8192, 8, 256, 2048, 512),  # Qwen3.5-35B-A3B
    catalogue.Shape(8192, 10, NEXT_EXPERTS, 2048, 512),
)


def every_case() -> Iterator[tuple[str, Launch]]:
    """Yield all shipped cuts at all sizes; weights' gradients in both precisions."""
    table = shipped_table()
    for target in ("sm_90", "sm_100"):
        for cuts in different_cuts(table[target]):
            for shape in SHAPES:
                exact = catalogue.launches(shape, cuts.__getitem__, weight_dtype=torch.float32)
                by_stage = catalogue.launches(shape, cuts.__getitem__)
                for launch in (*itertools.chain(*by_stage.values()), *exact["weight_gradient"]):
                    yield target, launch


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


def compile_all(target: str | None = None) -> Any:
    """Compile what had to be mended, or everything for one target."""
    wanted = list(cases()) if target is None else [c for c in every_case() if c[0] == target]
    if target:
        aot.compile_all([launch for _, launch in wanted], target, workers=2)
    return [
        asdict(aot.compile_ahead(launch, target)) | {"tma": launch.arguments.get("TMA", False)}
        for target, launch in wanted
    ]


def compiled(*which: str, cache: Path) -> Any:
    module = "tests.monkey_patch.kernels.test_aot_other_models"
    return json.loads(run_compiling("-m", module, *which, cache=cache))


def test_nothing_spills(tmp_path):
    found = compiled(cache=tmp_path)
    assert len(found) == 4
    assert_fits(found)


@pytest.mark.long
@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_the_shipped_cuts_fit_other_models(target, tmp_path):
    found = compiled(target, cache=tmp_path)
    assert_fits(found)
    assert all(one["tma_loads"] > 0 for one in found if one["tma"])
    assert sum(one["tma"] for one in found) >= len(SHAPES) * len(STAGES)


def assert_fits(found: Any) -> None:
    for one in found:
        assert one["programs_per_sm"] > 0, one
        assert one["spill_bytes"] == one["spill_stores"] == one["spill_loads"] == 0, one


if __name__ == "__main__":
    print(json.dumps(compile_all(*sys.argv[1:])))  # noqa: T201

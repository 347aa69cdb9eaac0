"""What the tuner may choose for weight gradients of few rows, compiled without a GPU.

Tiles of 128 x 128 of which two fit on a multiprocessor, and the persistent kernel, also where it
adds to gradients in float32, which takes the most registers and shared memory.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pytest
import torch

from monkey_patch.kernels import aot
from monkey_patch.kernels.launch import Launch
from monkey_patch.kernels.scatter_moe.routing import new_routing
from monkey_patch.kernels.scatter_moe.triton.catalogue import QWEN3_30B, Shape
from monkey_patch.kernels.scatter_moe.triton.tiles import Tiles
from monkey_patch.kernels.scatter_moe.triton.weight_gradient import weight_gradient_launch
from tests.support.compiler import run_compiling

pytestmark = [pytest.mark.kernel, pytest.mark.slow]

CODER_480B = Shape(8192, 8, 160, 6144, 2560)
WIDE = Tiles(128, 256, 64, 8, 7, tma=True, persistent=True)
TWICE = Tiles(128, 128, 64, 8, 5, tma=True, persistent=True, programs=2)
TWICE_OF_FOUR_WARPS = Tiles(128, 128, 64, 4, 5, tma=True, persistent=True, programs=2)
PLAIN = Tiles(128, 128, 64, 8, 5, tma=True, programs=2)
# sm_120 has 99 KiB of shared memory per program, and 100 per multiprocessor.
SMALL = Tiles(128, 128, 32, 8, 5, tma=True, persistent=True)


def launch(shape: Shape, cut: Tiles, *, gather_left: bool, adds: bool) -> Launch:
    """Return dW2 (`gather_left`) or dW1 in bfloat16; with `adds`, what is added to float32."""

    def empty(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    tokens, top_k, experts, hidden, width = shape
    index = empty(tokens, top_k, dtype=torch.int64)
    routing = new_routing(index, experts)
    m, n = (hidden, width) if gather_left else (2 * width, hidden)
    left, right = empty(tokens, m), empty(tokens * top_k, n)
    if not gather_left:
        left, right = empty(tokens * top_k, m), empty(tokens, n)
    out = empty(experts, m, n, dtype=torch.float32 if adds else torch.bfloat16)
    return weight_gradient_launch(
        left, right, out, routing.slot_of_row, routing.offsets, top_k, cut,
        gather_left=gather_left, accumulate=adds,
    )  # fmt: skip


def cases(which: str) -> Iterator[tuple[str, Tiles, Launch]]:
    if which == "default":
        for target in ("sm_90", "sm_100"):
            for cut in (WIDE, TWICE):
                yield target, cut, launch(QWEN3_30B, cut, gather_left=False, adds=True)
        return
    cuts = {"sm_90": (WIDE, TWICE, TWICE_OF_FOUR_WARPS, PLAIN), "sm_120": (SMALL,)}
    cuts["sm_100"] = cuts["sm_90"]
    for target, several in cuts.items():
        for cut in several:
            for gather_left in (False, True):
                # The plain kernel adds to float32 with too many registers for a second program.
                for adds in (False, True) if cut.persistent else (False,):
                    yield target, cut, launch(CODER_480B, cut, gather_left=gather_left, adds=adds)


def compile_all(which: str) -> Any:
    found = []
    for target, cut, one in cases(which):
        found.append(asdict(aot.compile_ahead(one, target)) | {"cut": asdict(cut)})
    return found


@pytest.mark.parametrize("which", ["default", pytest.param("rest", marks=pytest.mark.long)])
def test_candidates_fit(which, tmp_path):
    module = "tests.monkey_patch.kernels.test_aot_weight_gradient"
    compiled = json.loads(run_compiling("-m", module, which, cache=tmp_path))
    assert len(compiled) == {"default": 4, "rest": 32}[which]
    cores = {"sm_90": "wgmma", "sm_100": "tcgen05", "sm_120": "mma_sync"}
    for one in compiled:
        assert one["spill_bytes"] == one["spill_stores"] == one["spill_loads"] == 0, one
        assert one["programs_per_sm"] >= one["cut"]["programs"], one
        assert one[cores[one["target"]]] > 0, one
        assert one["tma_loads"] > 0, one
        assert one["cp_async"] > 0, one


if __name__ == "__main__":
    json.dump(compile_all(sys.argv[1]), sys.stdout)

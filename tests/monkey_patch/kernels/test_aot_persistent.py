"""Persistent products on row tiles, compiled without a GPU: does a tile's end overlap the next?

On Hopper one loop has to go through all steps of all tiles, in which the copies of later steps are
issued before a tile is stored. On datacenter Blackwell warps of their own load and multiply, into
one accumulator of two, while others store.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib import import_module
from typing import Any

import pytest

from monkey_patch.kernels import aot
from monkey_patch.kernels.scatter_moe.triton import catalogue
from monkey_patch.kernels.scatter_moe.triton.tiles import STAGES, Tiles, shipped_table
from tests.support.compiler import run_compiling
from tests.support.source_tree import ROOT

pytestmark = [pytest.mark.kernel, pytest.mark.slow]

WALK = {"num_warps": 8, "num_stages": 4, "tma": True, "persistent": True}
SOME = [
    ("sm_90", "down", Tiles(128, 256, 64, **WALK)),
    ("sm_90", "activation_gradient", Tiles(128, 128, 64, **WALK)),
    ("sm_100", "input_gradient", Tiles(128, 256, 64, **WALK, warp_specialize=True)),
    ("sm_100", "up", Tiles(128, 128, 64, **WALK, warp_specialize=True, epilogue_n=16)),
]
COPIES = ("async_tma_copy_global_to_local", "async_copy_global_to_local")


def candidates() -> Iterator[tuple[str, str, Tiles]]:
    """Yield every persistent cut of a stage on row tiles that the tuner tries."""
    sys.path.insert(0, str(ROOT / "bench"))
    module, table = import_module("parts.tune.candidates"), shipped_table()
    for target in ("sm_90", "sm_100", "sm_120"):
        for stage in STAGES:
            own = [cut for _, cut in table.get(target, table["default"])[stage]]
            found = module.candidates(stage, target, own, 32)
            yield from ((target, stage, cut) for cut in found if cut.persistent)


def compile_cuts(which: str) -> list[dict[str, Any]]:
    return [facts_of(*case) for case in (SOME if which == "some" else candidates())]


def facts_of(target: str, stage: str, cut: Tiles) -> dict[str, Any]:
    launch = catalogue.launches(catalogue.QWEN3_30B, lambda _: cut)[stage][0]
    compiled = aot.compile_for(launch, target)
    code = compiled.asm["ttgir"]
    store, loop = code.index("tt.store"), code.index("scf.for")
    facts = {
        "stage": stage,
        "cut": asdict(cut),
        "loops": code.count("scf.for"),
        "copies_before_store": any(loop < code.find(name, loop) < store for name in COPIES),
        "partitions": code.count("partition0(") + code.count("partition1("),
        "changes_registers": "setmaxnreg" in compiled.asm["ptx"],
        "tensor_memory": compiled.metadata.tmem_size,
    }
    return facts | asdict(aot.compile_ahead(launch, target))


def assert_overlap(one: dict[str, Any]) -> None:
    assert one["spill_bytes"] == one["spill_stores"] == one["spill_loads"] == 0, one
    assert one["programs_per_sm"] > 0, one
    assert one["wgmma"] + one["tcgen05"] + one["mma_sync"] > 0, one
    assert one["tma_loads"] > 0, one
    cut, columns = one["cut"], one["cut"]["block_n"] * (2 if one["stage"] == "up" else 1)
    if one["target"] == "sm_100":
        assert one["tensor_memory"] == 2 * columns, one
    if cut["warp_specialize"]:
        assert (one["partitions"], one["loops"], one["changes_registers"]) == (2, 3, True), one
    else:
        assert (one["partitions"], one["loops"], one["copies_before_store"]) == (0, 1, True), one


def test_some_persistent_cuts_overlap(tmp_path):
    module = "tests.monkey_patch.kernels.test_aot_persistent"
    found = json.loads(run_compiling("-m", module, "some", cache=tmp_path))
    assert len(found) == len(SOME)
    for one in found:
        assert_overlap(one)


@pytest.mark.long
def test_every_persistent_candidate_overlaps(tmp_path):
    module = "tests.monkey_patch.kernels.test_aot_persistent"
    found = json.loads(run_compiling("-m", module, "every", cache=tmp_path))
    assert {one["target"] for one in found} == {"sm_90", "sm_100", "sm_120"}
    for one in found:
        assert_overlap(one)


if __name__ == "__main__":
    json.dump(compile_cuts(sys.argv[1]), sys.stdout)

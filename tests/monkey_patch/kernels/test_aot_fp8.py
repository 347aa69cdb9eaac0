"""The shipped cuts of the FP8 kernels, compiled at the size of Qwen3-30B-A3B without a GPU.

The tests run this module in a process of its own, since the suite's interprets kernels, and judge
the JSON that it prints. What is compiled by default is what large batches run on; the rest is slow.

In mxfp8 the tensor cores have to take the scales: `block_scale` in the instruction's name. Where
Triton finds no such instruction for a tile it multiplies in bfloat16 instead, without a word.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pytest
import torch

from monkey_patch.kernels import aot
from monkey_patch.kernels.launch import Launch
from monkey_patch.kernels.scatter_moe.triton import catalogue
from monkey_patch.kernels.scatter_moe.triton.tiles import FP8_STAGES, STAGES, Tiles, shipped_table
from tests.support.compiler import run_compiling

pytestmark = pytest.mark.kernel

# sm_120 has the least shared memory of those that take the default rows, as much as sm_89.
LARGE, REST = ("sm_90",), ("sm_89", "sm_90", "sm_100", "sm_120")
PRODUCT = {
    "sm_90": r"wgmma\.mma_async\S*\.f32\.e4m3\.e4m3",
    "sm_100": r"tcgen05\.mma\S*kind::f8f6f4",
}
ANY_PRODUCT = r"mma\.sync\S*\.f32\.e4m3\.e4m3\.f32"
SCALED_PRODUCT = {
    "sm_100": r"tcgen05\.mma\S*kind::mxf8f6f4\.block_scale\S*",
    "sm_120": r"mma\.sync\S*kind::mxf8f6f4\.block_scale\S*\.f32\.e4m3\.e4m3\.f32\.ue8m0",
}
EVERY_PRODUCT = re.compile(r"(?:tcgen05\.mma|mma\.sync|wgmma\.mma_async)\.\S*")
COPY = re.compile(r"cp\.async\.c[ag]\.shared\.global[^;]*?\], (0x[0-9a-f]+|\d+)")
GATHERING = ("up", "activation_gradient")


def cuts_of(target: str, kind: str = "fp8_") -> list[dict[str, Tiles]]:
    """Return a cut of every stage, for few and for many rows."""
    table = shipped_table()
    rows = table.get(kind + target, table[kind + "default"])
    full = table.get(target, table["default"])
    depth = max(map(len, rows.values()))
    return [
        {
            stage: several[min(index, len(several) - 1)][1]
            for stage, several in (full | rows).items()
        }
        for index in range(depth)
    ]


def large_cases() -> Iterator[tuple[str, dict[str, Any], Launch]]:
    """Yield what a forward and a backward pass launch on large batches; `all` has the rest."""
    for target in LARGE:
        yield from cases(target, cuts_of(target)[-1], "blockwise")
    # One kernel tells whether the compiler emits the scaled product at all.
    yield from (
        case for case in cases("sm_100", cuts_of("sm_100", "mxfp8_")[-1], "mxfp8")
        if case[1]["stage"] == "down"
    )  # fmt: skip


def all_cases() -> Iterator[tuple[str, dict[str, Any], Launch]]:
    for target in REST:
        for cuts in cuts_of(target):
            yield from cases(target, cuts, "blockwise")
        yield from cases(target, cuts, "rowwise")
    options = {"recompute_hidden": True, "weight_dtype": torch.float32}
    yield from cases("sm_90", cuts_of("sm_90")[-1], "blockwise", **options)


def mxfp8_cases() -> Iterator[tuple[str, dict[str, Any], Launch]]:
    for target in SCALED_PRODUCT:
        for cuts in cuts_of(target, "mxfp8_"):
            yield from cases(target, cuts, "mxfp8")
    options = {"recompute_hidden": True, "weight_dtype": torch.float32}
    yield from cases("sm_100", cuts_of("sm_100", "mxfp8_")[-1], "mxfp8", **options)


def cases(
    target: str, cuts: dict[str, Tiles], scaling: str, **options: Any
) -> Iterator[tuple[str, dict[str, Any], Launch]]:
    by_stage = catalogue.launches(catalogue.QWEN3_30B, cuts.__getitem__, fp8=scaling, **options)
    for stage in ("quantize", *FP8_STAGES):
        facts = {"stage": stage, "scaling": scaling}
        facts |= {"cut": asdict(cuts[stage])} if stage in STAGES else {}
        yield from ((target, facts, launch) for launch in by_stage[stage])


def compiled(which: str) -> list[dict[str, Any]]:
    by_name = {"large": large_cases, "all": all_cases, "mxfp8": mxfp8_cases}
    found, wanted = [], list(by_name[which]())
    for target in {target for target, _, _ in wanted}:
        aot.compile_all([launch for t, _, launch in wanted if t == target], target, workers=2)
    for target, facts, launch in wanted:
        ptx = aot.compile_for(launch, target).asm["ptx"]
        product = (SCALED_PRODUCT if facts["scaling"] == "mxfp8" else PRODUCT).get(
            target, ANY_PRODUCT
        )
        products = len(re.findall(product, ptx))
        facts["other_products"] = len(EVERY_PRODUCT.findall(ptx)) - products
        copies = sorted({int(size, 0) for size in COPY.findall(ptx)})
        resources = asdict(aot.compile_ahead(launch, target))
        found.append(facts | resources | {"fp8_products": products, "copied_bytes": copies})
    return found


def assert_fits(found: list[dict[str, Any]]) -> None:
    for one in found:
        assert one["spill_bytes"] == one["spill_stores"] == one["spill_loads"] == 0, one
        assert one["programs_per_sm"] > 0, one
        assert one["shared_bytes"] <= 227 * 1024, one
        if one["stage"] not in STAGES:
            continue
        assert one["fp8_products"] > 0, one
        assert one["other_products"] == 0, one
        tensor_cores = {"sm_90": "wgmma", "sm_100": "tcgen05"}.get(one["target"], "mma_sync")
        assert one[tensor_cores] > 0, one
        assert (one["tma_loads"] > 0) == one["cut"]["tma"], one
        if one["stage"] in GATHERING:
            assert one["copied_bytes"] == [16], one


def table_of(found: list[dict[str, Any]]) -> str:
    """Return what is printed with `pytest -s`."""
    columns = ("target", "scaling", "kernel", "registers", "shared_bytes", "programs_per_sm")
    return "\n".join(" ".join(str(one[c]) for c in columns) for one in found)


def test_fp8_kernels_of_large_batches_fit(tmp_path):
    """No spills, tensor cores that multiply e4m3, TMA, and gathers that copy 128 bits at a time."""
    found = json.loads(
        run_compiling("-m", "tests.monkey_patch.kernels.test_aot_fp8", "large", cache=tmp_path)
    )
    sys.stdout.write(table_of(found))
    assert_fits(found)
    assert {one["target"] for one in found} == {*LARGE, "sm_100"}
    assert {one["stage"] for one in found} == {"quantize", *FP8_STAGES}


@pytest.mark.long
def test_every_shipped_fp8_cut_fits(tmp_path):
    found = json.loads(
        run_compiling("-m", "tests.monkey_patch.kernels.test_aot_fp8", "all", cache=tmp_path)
    )
    sys.stdout.write(table_of(found))
    assert_fits(found)
    seen = {(o["target"], o["stage"], Tiles(**o["cut"])) for o in found if o["stage"] in STAGES}
    for target in REST:
        assert {(target, s, cuts[s]) for cuts in cuts_of(target) for s in FP8_STAGES} <= seen
    assert {one["scaling"] for one in found} == {"blockwise", "rowwise"}


@pytest.mark.long
def test_every_mxfp8_cut_fits_and_scales_in_the_tensor_cores(tmp_path):
    found = json.loads(
        run_compiling("-m", "tests.monkey_patch.kernels.test_aot_fp8", "mxfp8", cache=tmp_path)
    )
    sys.stdout.write(table_of(found))
    assert_fits(found)
    assert {one["target"] for one in found} == set(SCALED_PRODUCT)
    assert {one["stage"] for one in found} == {"quantize", *FP8_STAGES}


if __name__ == "__main__":
    json.dump(compiled(sys.argv[1]), sys.stdout)

"""The shipped cuts of the expert kernels, compiled at the size of Qwen3-30B-A3B without a GPU.

The tests run `compile_all_cuts` in a process of its own, since the suite's interprets kernels, and
judge the JSON that it prints. By default that is bfloat16 on Hopper and datacenter Blackwell.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from monkey_patch.kernels import aot
from monkey_patch.kernels.launch import Launch
from monkey_patch.kernels.scatter_moe.triton import catalogue
from monkey_patch.kernels.scatter_moe.triton.tiles import STAGES, Tiles, shipped_table
from tests.support.compiler import run_compiling

pytestmark = [pytest.mark.kernel, pytest.mark.slow]

# sm_120 has the least shared memory of those that take the default rows, as much as sm_89.
TARGETS = ("sm_90", "sm_100")
OTHER_TARGETS = ("sm_80", "sm_120")
TENSOR_CORES = {"sm_90": "wgmma", "sm_100": "tcgen05"}
# These read one operand through an index, row by row and 128 bits at a time.
GATHERING = ("up", "activation_gradient", "weight_gradient")
INDEX_BYTES = 4  # weight_gradient has the index itself copied ahead
# PTX: cp.async.cg.shared.global [to], [from], bytes, ...;
COPY = re.compile(r"cp\.async\.c[ag]\.shared\.global[^;]*?\], (0x[0-9a-f]+|\d+)")


def cases_of(target: str) -> Iterator[tuple[dict[str, Any], Launch]]:
    """Yield every launch to compile for a target, with its stage, its cut and its precision."""
    table = shipped_table()
    rows = table.get(target, table["default"])
    for index, cuts in enumerate(different_cuts(rows)):
        yield from launches_of(cuts, everything=target == "sm_90" and index == 0)


def different_cuts(rows: dict[str, list[tuple[int | None, Tiles]]]) -> list[dict[str, Tiles]]:
    """Return the cuts of each bucket by stage, once where two buckets have the same."""
    buckets = [
        {stage: several[min(index, len(several) - 1)][1] for stage, several in rows.items()}
        for index in range(max(map(len, rows.values())))
    ]
    return [cuts for index, cuts in enumerate(buckets) if cuts not in buckets[:index]]


def variants() -> Iterator[tuple[dict[str, Any], Launch]]:
    """Yield Hopper's launches with weights in float32, recomputed hidden, and all in float32."""
    table = shipped_table()
    cuts = {stage: several[-1][1] for stage, several in table["sm_90"].items()}
    for facts, launch in launches_of(cuts, weight_dtype=torch.float32, recompute_hidden=True):
        if facts["stage"] in ("up", "weight_gradient"):
            yield facts, launch
    exact = {stage: several[0][1] for stage, several in table["float32"].items()}
    yield from launches_of(exact, dtype=torch.float32)


def launches_of(
    cuts: dict[str, Tiles], *, everything: bool = False, **options: Any
) -> Iterator[tuple[dict[str, Any], Launch]]:
    by_stage = catalogue.launches(catalogue.QWEN3_30B, cuts.__getitem__, **options)
    for stage, launches in by_stage.items():
        if stage in STAGES:
            facts = {"stage": stage, "cut": asdict(cuts[stage]), "is_bf16": "dtype" not in options}
            yield from ((facts, launch) for launch in launches)
        elif everything:
            yield from (({"stage": stage}, launch) for launch in launches)


def compile_all_cuts(which: str) -> Any:
    targets = TARGETS if which == "default" else OTHER_TARGETS
    wanted = {target: list(cases_of(target)) for target in targets}
    if which == "rest":
        wanted["sm_90"] = list(variants())
    found = []
    for target, cases in wanted.items():
        aot.compile_all([launch for _, launch in cases], target, workers=2)
        for facts, launch in cases:
            resources = asdict(aot.compile_ahead(launch, target))
            ptx = aot.compile_for(launch, target).asm["ptx"]
            copies = sorted({int(size, 0) for size in COPY.findall(ptx)})
            found.append(facts | resources | {"copied_bytes": copies})
    return found


def compiled(which: str, cache: Path) -> list[dict[str, Any]]:
    module = "tests.monkey_patch.kernels.test_aot_experts"
    return json.loads(run_compiling("-m", module, which, cache=cache))


def test_expert_kernels_fit(tmp_path):
    """No spills, tensor cores, TMA where chosen, and gathers that copy 128 bits at a time."""
    found = compiled("default", tmp_path)
    assert_fit(found)
    assert_every_cut(found, TARGETS)
    assert {"routing", "combine"} <= {one["stage"] for one in found}


@pytest.mark.long
def test_expert_kernels_fit_other_architectures_and_precisions(tmp_path):
    found = compiled("rest", tmp_path)
    assert_fit(found)
    assert_every_cut(found, OTHER_TARGETS)
    exact = {
        (one["stage"], Tiles(**one["cut"]))
        for one in found
        if one["target"] == "sm_90" and not one["is_bf16"]
    }
    assert {(s, rows[0][1]) for s, rows in shipped_table()["float32"].items()} <= exact


def assert_fit(found: list[dict[str, Any]]) -> None:
    for one in found:
        assert one["spill_bytes"] == one["spill_stores"] == one["spill_loads"] == 0, one
        assert one["programs_per_sm"] > 0, one
        if one["stage"] not in STAGES:
            continue
        assert (one["tma_loads"] > 0) == one["cut"]["tma"], one
        if one["is_bf16"]:
            assert one[TENSOR_CORES.get(one["target"], "mma_sync")] > 0, one
        if one["stage"] in GATHERING:
            assert 16 in one["copied_bytes"], one
            rest = {INDEX_BYTES} if one["stage"] == "weight_gradient" else set()
            assert set(one["copied_bytes"]) <= {16} | rest, one


def assert_every_cut(found: list[dict[str, Any]], targets: Sequence[str]) -> None:
    table = shipped_table()
    staged = [one for one in found if one["stage"] in STAGES and one["is_bf16"]]
    seen = {(one["target"], one["stage"], Tiles(**one["cut"])) for one in staged}
    for target in targets:
        for stage, rows in table.get(target, table["default"]).items():
            assert {(target, stage, cut) for _, cut in rows} <= seen


if __name__ == "__main__":
    json.dump(compile_all_cuts(sys.argv[1]), sys.stdout)

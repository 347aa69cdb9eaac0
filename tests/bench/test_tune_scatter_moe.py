"""The tuner of the expert kernels, proved on a CPU: what it tries, refuses, chooses and writes."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from importlib import import_module

import pytest

from monkey_patch.kernels.scatter_moe.triton.tiles import (
    STAGES,
    TABLE,
    Tiles,
    read_table,
    shipped_table,
)
from tests.support.compiler import run_compiling
from tests.support.interpreter import use_kernels
from tests.support.source_tree import ROOT

pytestmark = pytest.mark.kernel

CUT = Tiles(128, 128, 64, num_warps=8, num_stages=4, tma=True)
REFUSED = {
    # 128 x 256 accumulators over 128 threads are 256 each; a thread has at most 255 registers.
    "spills": ("down", replace(CUT, block_n=256, num_warps=4, num_stages=3)),
    "does not fit": ("down", replace(CUT, block_n=256, num_stages=6)),
    "power of 2": ("down", replace(CUT, block_k=48)),
}
COMPILE_REFUSED = f"""
import json, sys
sys.path.insert(0, "bench")
from parts.tune.candidates import compile_cut
from monkey_patch.kernels.scatter_moe.triton.catalogue import QWEN3_30B
from monkey_patch.kernels.scatter_moe.triton.tiles import Tiles
found = [compile_cut(*one, QWEN3_30B, "sm_90").problem for one in {list(REFUSED.values())}]
print(json.dumps(found))
"""


@pytest.fixture
def bench(monkeypatch):
    """Import a module of bench/ as its scripts do."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    return import_module


@pytest.fixture
def tune(bench, monkeypatch, tmp_path):
    """Run the tuner on interpreted kernels; return its report and the table that it wrote."""
    use_kernels(monkeypatch)

    def run(*options):
        files = tmp_path / "tune.json", tmp_path / "tiles.json"
        paths = ["--out", str(files[0]), "--write", str(files[1])]
        bench("tune_scatter_moe").main([*map(str, options), *paths])
        return [json.loads(file.read_text(encoding="utf-8")) for file in files]

    return run


def shipped(stage, architecture):
    table = shipped_table()
    return list(dict.fromkeys(cut for _, cut in table.get(architecture, table["default"])[stage]))


def timing(bench, stage="up", tokens=4096, cut=CUT, problem=None, **ms):
    rows = tokens * 8 // 128
    return bench("parts.tune.measure").Timing(stage, tokens, rows, cut, ms, {}, problem)


def test_dry_run_compiles_without_a_gpu(bench, tmp_path):
    out = tmp_path / "tune.json"
    options = ("--stages", "up", "--candidates", 3, "--workers", 1, "--out", out)
    command = ("bench/tune_scatter_moe.py", "--dry_run", "--architecture", "sm_90", *options)
    text = run_compiling(*command, cache=tmp_path)
    found = json.loads(out.read_text(encoding="utf-8"))
    cuts = [Tiles(**one["cut"]) for one in found["candidates"]]
    assert cuts == bench("parts.tune.candidates").candidates(
        "up", "sm_90", shipped("up", "sm_90"), 3
    )
    assert (len(cuts), found["stopped"], found["timings"]) == (3, None, [])
    for cut, one in zip(cuts, found["candidates"], strict=True):
        assert one["problem"] is None
        operands = bench("parts.tune.candidates").shared_bytes("up", cut)
        assert 0 <= one["resources"][0]["shared_bytes"] - operands < 2048, "the arithmetic holds"
        assert one["resources"][0]["wgmma"] > 0
    assert text.count(" registers ") == 3
    assert text.endswith("complete\n")


def test_the_compiler_throws_out(tmp_path):
    problems = json.loads(run_compiling("-c", COMPILE_REFUSED, cache=tmp_path))
    for problem, expected in zip(problems, REFUSED, strict=True):
        assert expected in problem


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "sm_120"])
@pytest.mark.parametrize("stage", STAGES)
def test_candidates(bench, stage, architecture):
    module, own = bench("parts.tune.candidates"), shipped(stage, architecture)
    found = module.candidates(stage, architecture, own, 32)
    assert found[: len(own)] == own
    assert len(set(found)) == len(found)
    is_product = stage in ("down", "input_gradient")
    assert [cut.library for cut in found[-2:]] == [False, is_product]
    compiled = [cut for cut in found if not cut.library]
    assert 12 <= len(compiled) <= 32
    assert {cut.tma for cut in compiled} == ({False} if architecture == "sm_80" else {True, False})
    most = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99}[architecture] * 1024
    assert max(module.shared_bytes(stage, cut) for cut in compiled) <= most
    assert {64, 128} == {cut.block_m for cut in compiled}
    assert {64, 128} <= {cut.block_n for cut in compiled}
    assert len({cut.num_stages for cut in compiled}) > 1
    assert len({cut.block_k for cut in compiled}) > 1


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "sm_120"])
@pytest.mark.parametrize("stage", STAGES)
def test_persistent_candidates_come_early(bench, stage, architecture):
    """Among the first 12, the shipped tile too; on Blackwell with warps of their own."""
    module, own = bench("parts.tune.candidates"), shipped(stage, architecture)
    found = module.candidates(stage, architecture, own, 32)
    walks = [cut for cut in found if cut.persistent]
    if stage == "weight_gradient":  # below
        return
    if architecture == "sm_80":
        assert not walks, "it has no descriptors"
        return
    assert walks[0] in found[:12]
    assert all(cut.tma and cut.num_warps == 8 for cut in walks)
    plain = {"persistent": False, "warp_specialize": False, "epilogue_n": 32}
    if architecture in ("sm_90", "sm_100"):
        assert own[-1] in [replace(cut, **plain) for cut in found[:12] if cut.persistent]
    parted = [cut for cut in walks if cut.warp_specialize]
    assert bool(parted) == (architecture == "sm_100")
    together = {replace(cut, warp_specialize=False, epilogue_n=32) for cut in parted}
    assert together <= set(found), "and with all warps alike"


@pytest.mark.parametrize("architecture", ["sm_90", "sm_100"])
def test_weight_gradients_of_few_rows_are_tried_early(bench, architecture):
    """Tiles of 128 x 128 of which two fit on a multiprocessor, and the walk over tiles."""
    own = shipped("weight_gradient", architecture)
    found = bench("parts.tune.candidates").candidates("weight_gradient", architecture, own, 16)
    two = [cut for cut in found if (cut.block_m, cut.block_n) == (128, 128)]
    assert {cut.num_warps for cut in two if not cut.persistent and cut.num_stages == 5} == {4, 8}
    assert {cut.num_warps for cut in two if cut.persistent and cut.programs == 2} == {4, 8}
    assert any(cut.persistent and cut.block_n == 256 for cut in found)


def test_a_tuned_table_is_tuned_again(bench):
    """What is persistent or the library's is tried as shipped, and beside it what one compiles."""
    own = [replace(CUT, persistent=True), replace(CUT, block_n=256, library=True)]
    found = bench("parts.tune.candidates").candidates("down", "sm_90", own, 8)
    assert found[:4] == [*own, CUT, replace(CUT, block_n=256)]
    assert sum(cut.library for cut in found) == 1


def test_the_fastest_is_chosen(bench):
    fastest = bench("parts.tune.table").fastest
    times = [(2.0, 9.0), (4.0, 4.0), (1.0, 8.5), (4.0, 4.0)]
    timings = [timing(bench, uniform=u, zipf=z) for u, z in times]
    wrong = timing(bench, uniform=0.1, zipf=0.1, problem="wrong")
    assert fastest([wrong, *timings]) is timings[1]
    assert fastest([wrong, timing(bench)]) is None
    assert fastest([]) is None


def test_rows_of_the_table(bench):
    table = bench("parts.tune.table")
    new = {rows: {"block_m": rows, "ms": 1.0, "tflops": 2.0} for rows in (64, 2048)}
    old = [
        {"max_rows": 96, "block_m": 1, "ms": 3.0, "tflops": 4.0},
        {"max_rows": 384, "block_m": 2, "ms": 3.0, "tflops": 4.0},
        {"max_rows": None, "block_m": 3},
    ]
    kept = [{"max_rows": limit, "block_m": m} for limit, m in ((96, 1), (384, 2), (None, 3))]
    assert table.merge({}, old) == kept, "a time is of the run that origin names"
    found = table.merge(new, old)
    assert [(row["max_rows"], row["block_m"]) for row in found] == [
        (96, 64),
        (384, 2),
        (None, 2048),
    ]
    assert ["ms" in row for row in found] == [True, False, True]
    found = table.merge(new | {96: new[64], 97: new[64], 512: new[64]}, old)
    assert [row["max_rows"] for row in found] == [78, 96, 384, 1024, None]
    assert [row["block_m"] for row in found] == [64, 64, 64, 64, 2048]
    one = table.row_of(timing(bench, uniform=1.0, zipf=3.0), product_flops=10**9)
    assert (one["ms"], one["tflops"]) == (2.0, 1.0)
    assert Tiles(**{k: v for k, v in one.items() if k not in ("ms", "tflops")}) == CUT
    assert "library" not in one


@pytest.mark.parametrize("architecture", ["sm_90", "sm_100", "sm_120"])
def test_one_size_is_measured_in_each_bucket(bench, architecture):
    table = shipped_table()
    stages = table.get(architecture, table["default"])
    found = bench("parts.tune.table").sizes(stages.values())
    assert found == [64, 256, 2048]
    for rows in stages.values():
        limits = [math.inf if limit is None else limit for limit, _ in rows]
        assert [next(i for i, end in enumerate(limits) if n <= end) for n in found] == [0, 1, 2]
    options = ["--dry_run", "--architecture", architecture, "--workers", "1", "--candidates", "0"]
    tune = bench("tune_scatter_moe")
    tuner = tune.Tuner(tune.parse([*options, "--stages", "up"]), {})
    tuner.compiling.close()
    assert tuner.tokens == [1024, 4096, 32768]


def test_buckets_without_a_border_have_one_size(bench):
    sizes = bench("parts.tune.table").sizes
    assert sizes([[(None, CUT)]]) == [2048]
    assert sizes([[(None, CUT)], [(3000, CUT), (None, CUT)]]) == [2000, 12000]


def test_other_architectures_stay_as_they_are(bench):
    table = bench("parts.tune.table")
    text = TABLE.read_text(encoding="utf-8")
    before = json.loads(text)
    assert table.table_text(before) == text, "one row per line"
    row = table.row_of(timing(bench, uniform=1.0, zipf=2.0), product_flops=10**12)
    for architecture in ("sm_90", "sm_103"):
        everything = {stage: {64: row, 256: row, 2048: row} for stage in STAGES}
        for measured in ({"up": {256: row}}, everything):
            after = table.updated(before, architecture, measured, "timed on X")
            again = json.loads(table.table_text(after))
            assert again == after
            cuts, old = read_table(again), read_table(before)
            for key in old.keys() - {architecture}:
                assert again["tiles"][key] == before["tiles"][key]
                assert again["origin"][key] == before["origin"][key]
            source = old.get(architecture, old["default"])
            assert cuts[architecture]["up"][1] == (384, CUT)
            assert [limit for limit, _ in cuts[architecture]["up"]] == [96, 384, None]
            if measured is everything:
                assert again["origin"][architecture] == "timed on X"
            else:
                assert again["origin"][architecture].startswith("rows with ms: timed on X; the ot")
                assert cuts[architecture]["down"] == source["down"]
                assert cuts[architecture]["up"][2] == source["up"][-1]


def test_the_harness_times_and_writes(tune, capsys):
    report, table = tune("--tokens", 16, "--stages", "down", "activation_gradient")
    assert report["stopped"] is None
    assert {one["stage"] for one in report["timings"]} == {"down", "activation_gradient"}
    assert sum(one["cut"].get("library", False) for one in report["timings"]) == 1
    for one in report["timings"]:
        assert one["problem"] is None
        assert one["ms"].keys() == one["rms_error"].keys() == {"uniform", "zipf"}
        assert all(0 < ms < math.inf for ms in one["ms"].values())
        assert one["tflops"] > 0
    for stage, by_rows in report["fastest"].items():
        ((rows, row),) = by_rows.items()
        means = [sum(o["ms"].values()) / 2 for o in report["timings"] if o["stage"] == stage]
        assert rows == "8"
        assert row["ms"] == pytest.approx(min(means), rel=1e-3)
        written = table["tiles"]["interpreter"][stage][0]
        assert {"max_rows": written["max_rows"]} | row == written
    assert "timed on " in table["origin"]["interpreter"]
    assert read_table(table).keys() == shipped_table().keys()
    text = capsys.readouterr().out
    assert "best cut" in text
    assert text.endswith("complete\n")


def test_what_is_wrong_is_not_timed(bench, monkeypatch):
    use_kernels(monkeypatch)
    case = bench("parts.ops.case").Case(
        16, "zipf", device="cpu", dtype="float32", hidden=32, intermediate=16, experts=4, top_k=2
    )
    work = bench("parts.tune.measure").Workload(case)
    cut = shipped("up", "interpreter")[0]
    for factor, is_right in ((1.0, True), (1.0001, False), (math.nan, False)):
        work.expected["weight_gradient"][1].mul_(factor)
        one = timing(bench, "weight_gradient", cut=cut)
        work.measure(one)
        assert (one.problem is None) == bool(one.ms) == is_right
    assert one.problem.startswith("wrong on zipf rows")


def test_a_run_out_of_time_keeps_what_it_has(tune, bench, monkeypatch):
    with pytest.raises(SystemExit, match="nothing was timed"):
        tune("--tokens", 16, "--seconds", 0)
    module = bench("tune_scatter_moe")
    # Each cut asks twice: for the compiler and for the GPU. The first two are the shipped ones.
    answers = itertools.chain([99.0] * 6, itertools.repeat(-1.0))
    monkeypatch.setattr(module.Tuner, "seconds_left", lambda self: next(answers))
    report, table = tune("--tokens", 16, 8, "--stages", "down", "up")
    assert report["stopped"] == "out of time"
    assert [one["stage"] for one in report["timings"]] == ["down", "up"]
    assert table["tiles"]["interpreter"]["down"][0]["ms"] > 0
    assert len(table["tiles"]["interpreter"]["input_gradient"]) == 1

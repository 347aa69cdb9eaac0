"""The race of experts implementations, proved on a CPU: what it refuses, reports and survives."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from importlib import import_module

import pytest
import torch

from monkey_patch.kernels.scatter_moe.reference import scatter_moe_reference
from tests.support.oracle import RMS_TOLERANCE, assert_close
from tests.support.source_tree import ROOT

RIGHT, WRONG, DIES, RAISES, HANGS = 24, 16, 17, 18, 19
FAULTY = f"""
import os, time
from monkey_patch.kernels.scatter_moe import scatter_moe

print("a package that greets")

def moe(x, *others):
    match len(x):
        case {DIES}: os._exit(7)
        case {RAISES}: raise LookupError("no such expert")
        case {HANGS}: time.sleep(600)
        case {WRONG}: return scatter_moe(x, *others) * 1.0001
    return scatter_moe(x, *others)
"""


@pytest.fixture
def bench(monkeypatch):
    """Import a module of bench/ as its scripts do."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    return import_module


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peers")
    (folder / "faulty.py").write_text(FAULTY, encoding="utf-8")
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return env | {"PYTHONPATH": str(ROOT), "BENCH_PEERS": str(folder)}


def race(environment, folder, *options, code=0):
    command = [sys.executable, ROOT / "bench" / "ops.py", "--out", folder / "ops.json", *options]
    done = subprocess.run(
        [*map(str, command)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == code, done.stderr
    return json.loads((folder / "ops.json").read_text(encoding="utf-8")), done.stdout


@pytest.fixture(scope="module")
def raced(environment, tmp_path_factory):
    """One race: tokens -> name -> result, the report, and what was printed."""
    names = ("ours", "ours_recompute", "grouped_mm", "scattermoe", "faulty:moe")
    tokens = (WRONG, DIES, RAISES, RIGHT)
    report, printed = race(
        environment, tmp_path_factory.mktemp("race"), "--only", *names,
        "--tokens", *tokens, "--routing", "zipf", "--seconds", 240,
    )  # fmt: skip
    results = {t: {} for t in tokens}
    for result in report["results"]:
        results[result["case"]["tokens"]][result["name"]] = result
    return results, report, printed


@pytest.mark.parametrize("name", ["ours", "ours_recompute", "grouped_mm"])
def test_what_is_right_is_timed(raced, name):
    for tokens, results in raced[0].items():
        result, case = results[name], results[name]["case"]
        assert result["status"] == "ok"
        assert max(result["rms_errors"].values()) < RMS_TOLERANCE[torch.float32]
        unit = tokens * case["top_k"] * case["hidden"] * case["intermediate"]
        for phase, flops in (("forward", 6 * unit), ("backward", 12 * unit), ("both", 18 * unit)):
            milliseconds = result[phase]["ms"]
            assert 0 < milliseconds["p20"] <= milliseconds["median"] <= milliseconds["p80"]
            tflops = flops / (milliseconds["median"] * 1e9)
            assert result[phase]["tflops"] == pytest.approx(tflops)


def test_ours_is_deterministic_and_saves_what_it_says(raced):
    ours, recomputed = raced[0][RIGHT]["ours"], raced[0][RIGHT]["ours_recompute"]
    case = ours["case"]
    hidden = 4 * case["top_k"] * 2 * case["intermediate"]  # float32
    assert ours["bit_equal"] is recomputed["bit_equal"] is True
    saved = ours["saved_bytes_per_token"] - recomputed["saved_bytes_per_token"]
    assert saved == pytest.approx(hidden)
    assert recomputed["saved_bytes_per_token"] < 0.1 * hidden


def test_what_is_wrong_is_not_timed(raced):
    result = raced[0][WRONG]["faulty:moe"]
    assert result["status"] == "failed"
    assert "wrong: out 1.0e-04" in result["reason"]
    assert not {"forward", "backward", "both", "peak_gib"} & set(result)


def test_a_missing_package_is_listed_with_its_reason(raced):
    reasons = {results["scattermoe"]["reason"] for results in raced[0].values()}
    assert reasons == {"ModuleNotFoundError: No module named 'scattermoe'"}


def test_the_race_survives_what_an_implementation_does_to_its_process(raced):
    found = {tokens: results["faulty:moe"] for tokens, results in raced[0].items()}
    assert "ended with code 7" in found[DIES]["reason"]
    assert found[RAISES]["reason"] == "LookupError: no such expert"
    assert found[RIGHT]["status"] == "ok"


def test_the_report_can_be_traced(raced):
    _, report, printed = raced
    assert report["device"]
    assert report["commit"]
    # A wheel's metadata may leave out what was built for, `+cu130`.
    assert report["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert report["versions_of_peers"]["grouped_mm"]["transformers"]
    assert {result["case"]["routing"] for result in report["results"]} == {"zipf"}
    assert f"### T={RIGHT} zipf, float32" in printed
    assert "not a GPU figure" in printed
    assert "- scattermoe: failed: ModuleNotFoundError" in printed


def test_a_race_without_time_says_so(environment, tmp_path):
    report, printed = race(environment, tmp_path, "--only", "ours", "--seconds", 1, code=1)
    assert {result["reason"] for result in report["results"]} == {"out of time"}
    assert "- ours: not run: out of time" in printed


def test_a_race_without_us_is_none(bench):
    shortcoming = bench("ops").shortcoming
    ok = {"name": "liger", "status": "ok"}
    ours = {"name": "ours", "case": {"tokens": 7}, "status": "failed", "reason": "wrong"}
    assert shortcoming([ok, {**ours, "status": "not run"}]) is None
    assert shortcoming([ok, {**ok, "status": "failed"}]) is None, "a peer may fail"
    assert shortcoming([ok, ours]) == "failed: ours, T=7: wrong"
    assert shortcoming([{**ok, "status": "failed"}]) == "nothing was measured"


def test_silence_has_an_end(bench, environment, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    process = bench("parts.ops.process").Process("faulty:moe")
    cpu_case = bench("parts.ops.case").cpu_case

    def ask(tokens, seconds):
        case = cpu_case(tokens, "uniform").as_json()
        return process.ask({"case": case, "only_compile": True}, seconds)

    assert ask(RIGHT, 120) == {"status": "compiled"}
    assert ask(HANGS, 1) == {"status": "failed", "reason": "no answer within 1 s"}
    assert ask(RIGHT, 120) == {"status": "compiled"}
    process.close()


@pytest.mark.parametrize("routing", ["uniform", "zipf"])
def test_the_reference_of_the_race_is_the_definition(bench, routing):
    ops_case = bench("parts.ops.case")
    inputs = ops_case.make_inputs(ops_case.cpu_case(50, routing))
    exact = [t.detach().double().requires_grad_() for t in inputs.leaves]
    x, gate_up, down, weights = exact
    out = scatter_moe_reference(x, gate_up, down, inputs.top_k_index, weights)
    truth = (out, *torch.autograd.grad(out, exact, inputs.grad.double()))
    found = ops_case.reference(inputs)
    assert len(found) == len(ops_case.RESULTS)
    for name, actual, expected in zip(ops_case.RESULTS, found, truth, strict=True):
        assert_close(actual, expected, name=name)


def test_inputs_are_what_the_table_says(bench):
    ops_case = bench("parts.ops.case")
    uniform, zipf = (ops_case.cpu_case(4000, routing) for routing in ("uniform", "zipf"))
    loads = {}
    for case in (uniform, zipf):
        inputs = ops_case.make_inputs(case)
        again = ops_case.make_inputs(case)
        assert all(map(torch.equal, inputs, again))
        index = inputs.top_k_index.sort(dim=-1).values
        assert (index[:, 1:] > index[:, :-1]).all(), "an expert twice for one token"
        loads[case.routing] = index.flatten().bincount(minlength=case.experts).sort().values
    mean = 4000 * uniform.top_k / uniform.experts
    assert loads["uniform"].float().sub(mean).abs().max() < 0.15 * mean
    assert loads["zipf"][-1] > 2 * mean > 4 * loads["zipf"][0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_limits_are_those_of_the_tests(bench, dtype):
    assert bench("parts.ops.case").LIMITS[dtype] == RMS_TOLERANCE[dtype]


def test_rms_ratio(bench):
    ops_case, refusal = bench("parts.ops.case"), bench("parts.ops.measure").refusal
    truth = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert ops_case.rms_ratio(torch.tensor([3.0, 4.5]), truth) == pytest.approx(0.1)
    assert refusal({"out": 0.1, "grad x": 0.3}, 0.2) == "grad x 3.0e-01; allowed RMS ratio 2e-01"
    assert refusal({"out": 0.1}, 0.2) is None
    missing = ops_case.rms_ratio(torch.tensor([3.0, math.nan]), truth)
    assert refusal({"out": missing}, 0.2) is not None
    with pytest.raises(ValueError, match="shape"):
        ops_case.rms_ratio(torch.zeros(1), truth)


def test_roof_counts_every_product(bench):
    case = bench("parts.ops.case").cpu_case(64, "uniform")
    found = bench("parts.ops.roof").measure_roof(case)
    products = found["products"]
    assert len(products) == 6
    assert min(products.values()) > 0
    rate = 3 * case.product_flops / found["forward"]["ms"]["median"] / 1e9
    assert found["forward"]["tflops"] == pytest.approx(rate)
    assert found["square_tflops"] > 0 < found["copy_read_and_write_gb_per_s"]

"""The race of FP8's halves at demo size, and the row it makes of it."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import make_dataclass

import pytest

from qwen3_sft.model.fp8 import MXFP8_EXPERTS, TABLE, Fp8Choice, choose_fp8
from tests.support.source_tree import ROOT


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    yield importlib.import_module("fp8")
    for name in ("fp8", "step", "parts.result_file"):
        sys.modules.pop(name, None)


def test_a_race_on_a_cpu(bench, tmp_path, capsys):
    out = tmp_path / "fp8.json"
    bench.main(
        [
            "--model",
            "demo",
            "--max_length",
            "64",
            "--warm_up",
            "1",
            "--steps",
            "1",
            "--out",
            str(out),
        ]
    )
    result = json.loads(out.read_text())
    assert list(result["rows"]) == ["off", "attention", "experts"]
    assert [row["options"]["fp8"] for row in result["rows"].values()] == list(result["rows"])
    assert "experts_fp8" in result["rows"]["experts"]["resolved"]["patches"]
    assert "linear_fp8" in result["rows"]["attention"]["resolved"]["patches"]
    assert result["over_bf16"].keys() == {"attention", "experts"}
    capsys.readouterr()
    with pytest.raises(SystemExit):
        bench.main(["--out", str(out), "--write", str(tmp_path / "table.json")])
    assert "a CPU emulates FP8" in capsys.readouterr().err


def test_a_row_is_what_auto_reads(bench):
    import torch

    from qwen3_sft.options.model_args import ModelArguments

    row = bench.entry(
        {"rows": {"off": {}}, "over_bf16": {"attention": 1.08}}, "NVIDIA H200", "results/fp8.json"
    )
    assert row == {"H200 SXM": {"attention": 1.08, "experts": 0.0, "source": "results/fp8.json"}}, (
        "experts that failed are no gain"
    )
    result = {"rows": dict.fromkeys(("off", "attention", "experts", "experts_mxfp8"))}
    faster = bench.entry(result | {"over_bf16": {"experts_mxfp8": 1.3}}, "NVIDIA B200", "x")
    assert next(iter(faster.values()))["experts_mxfp8"] == 1.3
    choice = choose_fp8(
        ModelArguments(fp8="auto"), torch.device("cpu"), packing=True,
        measured={"cpu": row["H200 SXM"]},
    )  # fmt: skip
    assert choice == Fp8Choice(attention=True)
    with pytest.raises(SystemExit, match=r"not in qwen3_sft/hardware\.py"):
        bench.entry({"over_bf16": {}}, "Quadro", "x")


def test_mxfp8_races_where_a_device_takes_it(bench):
    """The options of a step as they are with the field that `fp8_scaling` is in a run."""
    options = make_dataclass("Options", [("fp8", str, "off"), ("fp8_scaling", str, "blockwise"),
                                         ("breakdown", bool, True)])()  # fmt: skip
    racers = bench.racers(options, mxfp8=True)
    assert {name: (one.fp8, one.fp8_scaling) for name, one in racers.items()} == {
        "off": ("off", "blockwise"), "attention": ("attention", "blockwise"),
        "experts": ("experts", "blockwise"), "experts_mxfp8": ("experts", "mxfp8"),
    }  # fmt: skip
    assert list(bench.racers(options, mxfp8=False)) == ["off", "attention", "experts"]


def test_the_shipped_table_is_one():
    for row in json.loads(TABLE.read_text()).values():
        assert {"attention", "experts", "source"} == row.keys() - {MXFP8_EXPERTS}
        assert (ROOT / row["source"]).is_file(), "a row without its measurement"

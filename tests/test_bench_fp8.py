"""The race of FP8's halves at demo size, and the row it makes of it."""

from __future__ import annotations

import importlib
import json
import sys

import pytest

from qwen3_sft.fp8 import TABLE, Fp8Choice, choose_fp8
from tests.source_tree import ROOT


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    yield importlib.import_module("fp8")
    for name in ("fp8", "step", "provenance"):
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

    from qwen3_sft.args import ModelArguments

    row = bench.entry({"over_bf16": {"attention": 1.08}}, "NVIDIA H200", "results/fp8.json")
    assert row == {"H200 SXM": {"attention": 1.08, "experts": 0.0, "source": "results/fp8.json"}}, (
        "experts that failed are no gain"
    )
    choice = choose_fp8(
        ModelArguments(fp8="auto"), torch.device("cpu"), packing=True,
        measured={"cpu": row["H200 SXM"]},
    )  # fmt: skip
    assert choice == Fp8Choice(attention=True)
    with pytest.raises(SystemExit, match=r"not in qwen3_sft/hardware\.py"):
        bench.entry({"over_bf16": {}}, "Quadro", "x")


def test_the_shipped_table_is_one():
    for row in json.loads(TABLE.read_text()).values():
        assert {"attention", "experts", "source"} == row.keys()
        assert (ROOT / row["source"]).is_file(), "a row without its measurement"

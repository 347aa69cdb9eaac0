"""The benchmark of loading: what it counts, what it loads, and that it runs."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import subprocess
import sys
import time
from importlib import import_module

import pytest
import torch
from safetensors import safe_open
from torch import nn

from qwen3_sft.distributed.engine import detect
from qwen3_sft.model.meta_model import known_config, model_on_meta
from qwen3_sft.options.recipe import parse_options
from tests.support.source_tree import ROOT

MIB = 2**20


@pytest.fixture
def bench(monkeypatch):
    """Import a module of bench/ as its scripts do."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    return import_module


def test_status_is_read(bench):
    status = (
        "Name:\tpython\nVmHWM:\t    900 kB\nRssAnon:\t     500 kB\n"
        "RssFile:\t     300 kB\nRssShmem:\t      20 kB\n"
    )
    resident = bench("parts.load.memory").Resident
    assert resident.parse(status) == resident(520 * 1024, 300 * 1024, 900 * 1024)


def test_a_peak_is_seen_though_it_is_gone_at_the_end(bench, tmp_path):
    memory = bench("parts.load.memory")
    mapped = tmp_path / "mapped"
    mapped.write_bytes(os.urandom(32 * MIB))
    # What other tests have freed would be used again without any growth.
    ctypes.CDLL(None).malloc_trim(0)
    with memory.PeakMemory() as peak:
        kept = torch.ones(40 * MIB, dtype=torch.uint8)
        # Mapped by itself: of its heap the C library gives back the end at most.
        gone = mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE)
        torch.frombuffer(gone, dtype=torch.uint8).fill_(1)
        pages = torch.from_file(str(mapped), size=32 * MIB, dtype=torch.uint8)
        assert pages.max() > 0
        enough = peak.growth.samples + 5
        while peak.growth.samples < enough:
            time.sleep(0.001)
        del gone, pages
    growth = peak.growth
    assert kept.nbytes == 40 * MIB
    assert growth.anonymous == pytest.approx(104 * MIB, rel=0.1)
    # Code that runs for the first time is mapped from files too.
    assert growth.file == pytest.approx(32 * MIB, rel=0.2)
    assert growth.total_by_kernel == pytest.approx(136 * MIB, rel=0.1)
    assert growth.total == pytest.approx(growth.total_by_kernel, rel=0.05)
    assert growth.anonymous_after == pytest.approx(40 * MIB, rel=0.3)
    assert growth.file_after < 8 * MIB
    with memory.PeakMemory(peak.start) as later:
        pass
    assert later.growth.anonymous >= 20 * MIB, "counted from the same start"


def test_a_process_in_one_line(bench):
    table = bench("parts.load.table")
    loading = {"anonymous": 3e9, "file": 1e9, "anonymous_after": 2.5e9, "seconds": 4.0}
    placing = {"anonymous": 4e9, "file": 0, "anonymous_after": 1.25e9, "seconds": 2.0}
    rank = {"rank": 1, "kept": 1_000_000_000, "phases": {"loading": loading, "placing": placing}}
    assert table.summary(rank, 2e9) == {
        "own": 4e9, "own_of_checkpoint": 2, "own_of_kept": 4, "kept": 1e9, "left": 0.25e9,
        "mapped": 1e9, "seconds": 6.0,
    }  # fmt: skip
    report = {
        "device": "a CPU",
        "parameters": 1_000_000_000,
        "results": [{"name": "fsdp", "ranks": [rank]}],
    }
    line = table.table(report).splitlines()[-1]
    assert line.split() == ["fsdp", "1", "4.00", "2.00", "4.00", "1.00", "0.25", "1.00", "6.0"]


def test_the_model_has_the_proportions_of_the_real_one(bench):
    def shares(config) -> dict[str, float]:
        model = model_on_meta(config)
        total = sum(p.numel() for p in model.parameters())
        sums = dict.fromkeys(("experts", "self_attn", "embed", "lm_head"), 0)
        for name, parameter in model.named_parameters():
            for part in sums:
                sums[part] += parameter.numel() if part in name else 0
        return {part: count / total for part, count in sums.items()}

    real = shares(known_config("Qwen/Qwen3-30B-A3B"))
    config = bench("parts.load.checkpoint").config_of("1gb")
    for part, share in shares(config).items():
        assert share == pytest.approx(real[part], abs=0.02), part
    assert config.num_experts == 128
    assert config.moe_intermediate_size / config.hidden_size == 768 / 2048
    assert config.num_attention_heads / config.num_key_value_heads == 32 / 4
    size = 2 * sum(p.numel() for p in model_on_meta(config).parameters())
    assert 1e9 < size < 1.2e9


def test_the_checkpoint_is_one_of_the_hub(bench, tmp_path):
    checkpoint = bench("parts.load.checkpoint")
    checkpoint.make_checkpoint(tmp_path, "tiny")
    file = tmp_path / "tiny" / "model.safetensors"
    with safe_open(file, framework="pt") as weights:
        name = "model.layers.1.mlp.experts.15.up_proj.weight"
        assert weights.get_tensor(name).dtype == torch.bfloat16
        assert weights.get_tensor(name).float().std().item() == pytest.approx(0.02, rel=0.1)
        count = sum(weights.get_tensor(key).numel() for key in weights.keys())  # noqa: SIM118
    model = model_on_meta(checkpoint.config_of("tiny"))
    assert count == sum(p.numel() for p in model.parameters())
    before = file.stat().st_mtime_ns
    checkpoint.make_checkpoint(tmp_path, "tiny")
    assert file.stat().st_mtime_ns == before, "made once"


def test_every_engine_is_launched_as_itself(bench, tmp_path, monkeypatch):
    launches, environment = (
        bench("parts.load.launch").LAUNCHES,
        bench("parts.load.launch").accelerate_environment,
    )
    monkeypatch.chdir(ROOT)
    for name, launch in launches.items():
        options = parse_options(launch.argv(tmp_path, tmp_path / "out"))
        env = {"WORLD_SIZE": str(launch.processes)}
        if launch.config:
            file = bench("parts.load.launch").CONFIG / f"{launch.config}.json"
            env |= environment(str(file), launch.processes)
        engine = detect(options.model, options.data, env)
        assert engine.kind == name.split()[0]
        assert (engine.fsdp_size, engine.ep_size) == (
            2 if engine.kind == "native" else 1,
            2 if "ep 2" in name else 1,
        )


def test_kept_bytes_count_this_process(bench):
    model = nn.Linear(3, 5, dtype=torch.bfloat16)
    sharded = nn.Parameter(torch.empty(0))
    sharded.ds_tensor = torch.empty(7)  # as DeepSpeed leaves a parameter
    model.register_parameter("shard", sharded)
    assert bench("parts.load.worker").kept_bytes(model) == 2 * (15 + 5) + 4 * 7


@pytest.mark.distributed
def test_it_runs(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "bench" / "load.py", "--size", "tiny", "--only", "single",
         "fsdp", "native fsdp 2 as found", "--out", tmp_path / "load.json"],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "load.json").read_text(encoding="utf-8"))
    found = {result["name"]: result["ranks"] for result in report["results"]}
    assert {name: len(ranks) for name, ranks in found.items()} == {
        "single": 1, "fsdp": 2, "native fsdp 2 as found": 2,
    }  # fmt: skip
    whole = found["single"][0]["kept"]
    assert whole == 4 * report["parameters"]
    for name in ("fsdp", "native fsdp 2 as found"):
        assert sum(rank["kept"] for rank in found[name]) == pytest.approx(whole, rel=0.01)
    assert [*found["fsdp"][1]["phases"]] == ["loading", "placing"]
    assert "GB of each process" in done.stdout
    assert report["commit"]
    assert report["versions"]["transformers"]

"""The script that measures loading: what it counts, what it loads, and that it runs."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import sys
from importlib import import_module

import pytest
import torch
from safetensors import safe_open

from qwen3_sft.model.meta_model import known_config, model_on_meta
from tests.support.commands import free_port, run, succeeds, wait_until
from tests.support.source_tree import ROOT

MIB = 2**20


@pytest.fixture
def bench(monkeypatch):
    """Import a module of bench/ as its scripts do."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    return import_module


def test_a_peak_is_seen_though_it_is_gone_at_the_end(bench, tmp_path):
    mapped = tmp_path / "mapped"
    mapped.write_bytes(os.urandom(32 * MIB))
    # What other tests have freed would be used again without any growth.
    ctypes.CDLL(None).malloc_trim(0)
    with bench("load").HostMemory() as memory:
        kept = torch.ones(40 * MIB, dtype=torch.uint8)
        # Mapped by itself: of its heap the C library gives back the end at most.
        gone = mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE)
        torch.frombuffer(gone, dtype=torch.uint8).fill_(1)
        pages = torch.from_file(str(mapped), size=32 * MIB, dtype=torch.uint8)
        assert pages.max() > 0
        wait_until(lambda: memory.own > 100 * MIB and memory.mapped > 30 * MIB)
        del gone, pages
    assert kept.nbytes == 40 * MIB
    assert memory.own == pytest.approx(104 * MIB, rel=0.1)
    # Code that runs for the first time is mapped from files too.
    assert memory.mapped == pytest.approx(32 * MIB, rel=0.2)
    assert memory.own_after == pytest.approx(40 * MIB, rel=0.3)


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
    config = bench("parts.random_checkpoint").config_of("1gb")
    for part, share in shares(config).items():
        assert share == pytest.approx(real[part], abs=0.02), part
    assert config.num_experts == 128
    assert config.moe_intermediate_size / config.hidden_size == 768 / 2048
    assert config.num_attention_heads / config.num_key_value_heads == 32 / 4
    size = 2 * sum(p.numel() for p in model_on_meta(config).parameters())
    assert 1e9 < size < 1.2e9


def test_the_checkpoint_is_one_of_the_hub(bench, tmp_path):
    checkpoint = bench("parts.random_checkpoint")
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


def load(*command, folder):
    script = ROOT / "bench" / "load.py", "--size", "tiny", "--folder", folder
    printed = succeeds(run(sys.executable, *command[:-1], *script, *command[-1]))
    rows = sorted(map(json.loads, printed.splitlines()), key=lambda row: row["rank"])
    for row in rows:
        assert row["own"] > row["kept"] > 0
        assert row["commit"]
        assert row["versions"]["transformers"]
    return rows


def test_it_runs(bench, tmp_path):
    (whole,) = load((), folder=tmp_path)
    assert (whole["engine"], whole["rank"]) == ("single", 0)
    model = model_on_meta(bench("parts.random_checkpoint").config_of("tiny"))
    assert whole["kept"] == 4 * sum(p.numel() for p in model.parameters())


@pytest.mark.long
@pytest.mark.distributed
def test_it_runs_on_two_processes(bench, tmp_path):
    bench("parts.random_checkpoint").make_checkpoint(tmp_path, "tiny")
    launcher = "-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", free_port()
    shards = load(*launcher, ("--fsdp_size", 2), folder=tmp_path)
    assert [shard["rank"] for shard in shards] == [0, 1]
    assert all(shard["engine"].startswith("native (fsdp_size 2") for shard in shards)
    model = model_on_meta(bench("parts.random_checkpoint").config_of("tiny"))
    whole = 4 * sum(p.numel() for p in model.parameters())
    assert sum(shard["kept"] for shard in shards) == pytest.approx(whole, rel=0.01)

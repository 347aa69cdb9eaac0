"""Where a step's time goes: every microsecond belongs to one component and phase."""

from __future__ import annotations

import json
from collections import Counter
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import monkey_patch
from qwen3_sft.demo.model import tiny_config, tiny_model
from qwen3_sft.model.activation_checkpointing import enable_checkpointing
from tests.support.source_tree import ROOT


@pytest.fixture
def bench(monkeypatch):
    """Import a module of bench/ as its scripts do."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    return import_module


def test_what_a_gpu_would_leave(bench):
    """Kernels by their launch: forward, recomputed, of a node of another thread, unknown."""
    breakdown = bench("parts.step.breakdown")

    def host(name: str, ts: float, dur: float, tid: int = 1, cat: str = "cpu_op", **args):
        return {"ph": "X", "cat": cat, "name": name, "tid": tid, "ts": ts, "dur": dur,
                "args": args}  # fmt: skip

    def launch(correlation: int, ts: float, tid: int = 1):
        return host("cudaLaunchKernel", ts, 1, tid, "cuda_runtime", correlation=correlation)

    def kernel(correlation: int, dur: float, **args):
        return host(f"kernel {correlation}", 900, dur, 7, "kernel",
                    correlation=correlation, **args)  # fmt: skip

    node = "autograd::engine::evaluate_function: "
    events = [
        host("bench::all", 0, 1000, cat="user_annotation"),
        host("bench::experts", 10, 50, cat="user_annotation"),
        host("aten::detach", 11, 2, **{"Sequence number": 5}),
        host("aten::mm", 20, 20, **{"Sequence number": 5, "External id": 3}),
        launch(100, 25),
        host("bench::router", 70, 20, cat="user_annotation"),
        host("aten::topk", 72, 15, **{"Sequence number": 6}),
        launch(101, 75),
        # The backward thread: the node of the product, with a layer recomputed in it.
        host(node + "TopkBackward0", 100, 20, 2, **{"Sequence number": 6, "Fwd thread id": 1}),
        launch(102, 105, 2),
        host(node + "MmBackward0", 130, 80, 2, **{"Sequence number": 5, "Fwd thread id": 1}),
        host("bench::norms_rope", 140, 30, 2, "user_annotation"),
        # A number of the backward thread's own, which is not that of the main thread.
        host("aten::mul", 145, 20, 2, **{"Sequence number": 6}),
        launch(103, 150, 2),
        launch(104, 180, 2),
        host(node + "torch::autograd::AccumulateGrad", 220, 20, 2),
        launch(105, 230, 2),
        host("Optimizer.step#AdamW.step", 300, 20, cat="user_annotation"),
        launch(106, 310),
        launch(107, 400),
        host("before the steps", -50, 20),
        host("ignored", 5, 5, 1, "python_function"),
        kernel(100, 1), kernel(101, 2), kernel(102, 4), kernel(103, 8), kernel(104, 16),
        kernel(105, 32), kernel(106, 64), kernel(107, 128), kernel(999, 256),
        kernel(998, 512, **{"External id": 3}),
    ]  # fmt: skip
    found = breakdown.breakdown(events)
    assert dict(found.by_place) == {
        ("experts", "forward"): 1 + 512,
        ("router", "forward"): 2,
        ("router", "backward"): 4,
        ("norms_rope", "recompute"): 8,
        ("experts", "backward"): 16,
        ("optimizer", "update"): 32 + 64,
        ("other", "forward"): 128 + 256,
    }
    assert found.total == 1023
    assert dict(found.other) == {"kernel 107": 128, "kernel 999": 256}
    assert (found.clock, found.wall) == ("kernels", 1000)
    report = found.per_token(10)
    assert report["other_share"] == pytest.approx(384 / 1023)
    assert "router" in "\n".join(breakdown.table(report))


def test_a_trace_without_the_steps(bench):
    with pytest.raises(ValueError, match="bench::all"):
        bench("parts.step.breakdown").breakdown([])


@pytest.fixture
def profiled(bench, tmp_path):
    """Profile three steps of a tiny model on this CPU and part them."""
    ranges = bench("parts.step.ranges")

    def run(checkpointing: str = "full", **sizes):
        model = tiny_model(tiny_config(256, num_hidden_layers=2, **sizes))
        monkey_patch.apply_patches(
            model, ["scatter_moe", "varlen_attention", "linear_cross_entropy"]
        )
        enable_checkpointing(model, {checkpointing: 2})
        optimizer = torch.optim.AdamW(model.parameters())
        ids = torch.randint(256, (1, 512))
        cu_seq_lens = torch.tensor([0, 200, 512], dtype=torch.int32)
        batch = {"cu_seq_lens_q": cu_seq_lens, "cu_seq_lens_k": cu_seq_lens,
                 "max_length_q": 312, "max_length_k": 312}  # fmt: skip
        accelerator = SimpleNamespace(clip_grad_norm_=torch.nn.utils.clip_grad_norm_)
        handle = ranges.Ranges(model, accelerator)
        with profile(activities=[ProfilerActivity.CPU]) as prof, record_function(ranges.ALL):
            for _ in range(3):
                loss = model(
                    ids, label_positions=torch.arange(511), label_targets=ids[0, 1:], **batch
                ).loss
                loss.backward()
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        handle.close()
        prof.export_chrome_trace(str(tmp_path / "trace.json"))
        events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
        return SimpleNamespace(
            found=bench("parts.step.breakdown").breakdown(events), prof=prof, model=model,
            accelerator=accelerator,
        )  # fmt: skip

    return run


def test_the_parts_are_the_whole(bench, profiled):
    one = profiled()
    found = one.found
    # Every operation of the profiler's own tables, each without those it calls.
    whole = sum(e.self_cpu_time_total for e in one.prof.key_averages())
    assert sum(found.by_place.values()) == pytest.approx(whole, rel=0.02)
    assert found.total == pytest.approx(whole, rel=0.02)
    assert min(found.by_place.values()) >= 0
    assert sum(found.other.values()) < 0.15 * found.total
    components = bench("parts.step.ranges").COMPONENTS
    phases = {c: {p.phase for p in found.by_place if p.component == c} for c in components}
    thrice = {"forward", "recompute", "backward"}
    for component in ("attention", "projections", "experts", "router", "norms_rope"):
        assert phases[component] - {"update"} == thrice, component
    assert phases["optimizer"] == {"update"}
    assert phases["embedding"] == phases["cross_entropy"] == {"forward", "backward"}
    assert phases["dense"] == set()


def test_nothing_stays_on_the_model(profiled):
    before = Counter(ALL_ATTENTION_FUNCTIONS.valid_keys())
    one = profiled("none")
    assert Counter(ALL_ATTENTION_FUNCTIONS.valid_keys()) == before
    assert "torch_varlen" not in ALL_ATTENTION_FUNCTIONS._local_mapping
    assert one.accelerator.clip_grad_norm_ is torch.nn.utils.clip_grad_norm_
    hooks = [m._forward_hooks or m._forward_pre_hooks for m in one.model.modules()]
    assert not any(hooks)
    assert "recompute" not in {place.phase for place in one.found.by_place}


def test_more_experts_per_token_take_more_time(profiled):
    def share(top_k: int) -> float:
        sizes = {"num_experts_per_tok": top_k, "moe_intermediate_size": 256}
        found = profiled("none", **sizes).found
        experts = sum(us for place, us in found.by_place.items() if place[0] == "experts")
        return experts / found.total

    assert share(8) > 1.2 * share(1)


def test_components_by_name(bench):
    component_of = bench("parts.step.ranges").component_of
    model = tiny_model(tiny_config(256, num_hidden_layers=2, mlp_only_layers=[1]))
    found = {name: component_of(name, module) for name, module in model.named_modules()}
    assert found["model.layers.0.mlp"] == found["model.layers.0.mlp.experts"] == "experts"
    assert found["model.layers.1.mlp"] == "dense"
    assert found["model.layers.1.mlp.down_proj"] is None
    assert found["model.layers.0.self_attn.k_proj"] == "projections"
    assert found["model.layers.0"] == found["model.norm"] == "norms_rope"

"""The expert kernels as a GPU runs them: numbers, determinism, graphs, waiting, memory."""

import copy
import json

import pytest
import torch

from monkey_patch.kernels.scatter_moe import scatter_moe
from monkey_patch.kernels.scatter_moe.reference import scatter_moe_reference
from monkey_patch.kernels.scatter_moe.triton import tiles as tile_table
from monkey_patch.kernels.scatter_moe.triton.tiles import STAGES, choose_tiles
from tests.monkey_patch.kernels.experts import NAMES, make_inputs, run_with_gradients
from tests.support.oracle import assert_close
from tests.support.training import PATCHES, Documents, make_trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
QWEN3 = {"E": 128, "K": 8, "D": 2048, "F": 768}


def on_gpu(**sizes):
    tensors, index = make_inputs(**sizes)
    return [t.cuda() for t in tensors], index.cuda()


def assert_matches(tensors, index, **options):
    truth = run_with_gradients(scatter_moe_reference, tensors, index, torch.float64)

    def run(*arguments):
        return scatter_moe(*arguments, **options)

    for name, a, e in zip(("out", *NAMES), run_with_gradients(run, tensors, index), truth,
                          strict=True):  # fmt: skip
        assert_close(a, e, name=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "sizes",
    [
        {"T": 500, "E": 16, "K": 4, "D": 256, "F": 128},
        {"T": 3000, "E": 4, "K": 2, "D": 128, "F": 256},
        {"T": 257, "E": 7, "K": 3, "D": 200, "F": 72},
        {"T": 129, "E": 5, "K": 1, "D": 63, "F": 33},
        {"T": 0, "E": 4, "K": 2, "D": 64, "F": 64},
    ],
    ids=lambda sizes: "-".join(map(str, sizes.values())),
)
@pytest.mark.parametrize("recompute", [False, True])
def test_forward_and_gradients(dtype, sizes, recompute):
    if dtype == torch.float32 and recompute:
        pytest.skip("the dtype decides nothing about recomputing")
    assert_matches(*on_gpu(dtype=dtype, **sizes), recompute_hidden=recompute)


@pytest.mark.parametrize("tokens", [64, 1000, 4096])
def test_the_layer_of_qwen3_30b(tokens):
    """Against the routed computation in float32, expert by expert."""
    tensors, index = on_gpu(T=tokens, dtype=torch.bfloat16, **QWEN3)
    index[:7] = 130  # sentinels
    index[7:200] = torch.arange(8, device="cuda")  # a crowd on the first eight
    got = run_with_gradients(scatter_moe, tensors, index)
    truth = run_with_gradients(scatter_moe, [t.double() for t in tensors], index)
    for name, a, e in zip(("out", *NAMES), got, truth, strict=True):
        assert_close(a, e, name=name)


@pytest.mark.parametrize("rows", [64, 256, 2048])
def test_every_shipped_cut_runs(rows, monkeypatch):
    """Each row of the table, whatever this GPU's own bucket would be."""
    tensors, index = on_gpu(T=300, E=8, K=2, D=512, F=256, dtype=torch.bfloat16)

    def chosen(stage, architecture, dtype, _):
        return choose_tiles(stage, architecture, dtype, rows)

    for module in ("stages", "warm_up"):
        name = f"monkey_patch.kernels.scatter_moe.triton.{module}.choose_tiles"
        monkeypatch.setattr(name, chosen)
    assert_matches(tensors, index)


@pytest.mark.parametrize(
    "changes",
    [
        {"persistent": True},
        {"persistent": True, "tma": False},
        {"persistent": True, "warp_specialize": True, "epilogue_n": 16},
        {"tma": False},
        {"library": True},
    ],
)
def test_every_way_to_launch(changes, monkeypatch):
    tensors, index = on_gpu(T=700, E=8, K=2, D=512, F=256, dtype=torch.bfloat16)

    def chosen(*arguments):
        return tile_table.replace(choose_tiles(*arguments), **changes)

    for module in ("stages", "warm_up"):
        name = f"monkey_patch.kernels.scatter_moe.triton.{module}.choose_tiles"
        monkeypatch.setattr(name, chosen)
    assert_matches(tensors, index)


def test_two_runs_are_bit_equal():
    inputs = on_gpu(T=4096, dtype=torch.bfloat16, **QWEN3)
    first = run_with_gradients(scatter_moe, *inputs)
    for a, b in zip(first, run_with_gradients(scatter_moe, *inputs), strict=True):
        assert torch.equal(a, b)


def test_no_waiting_for_the_device():
    tensors, index = on_gpu(T=512, dtype=torch.bfloat16)
    run_with_gradients(scatter_moe, tensors, index)
    x, gate_up, down, weights = (t.requires_grad_() for t in tensors)
    torch.cuda.set_sync_debug_mode("error")
    try:
        scatter_moe(x, gate_up, down, index, weights).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_graph_follows_its_inputs():
    (x, gate_up, down, weights), index = on_gpu(T=256, dtype=torch.bfloat16)
    scatter_moe(x, gate_up, down, index, weights)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = scatter_moe(x, gate_up, down, index, weights)
    index.copy_(torch.rand(256, 8, device="cuda").argsort(dim=1)[:, :2])
    x.normal_()
    graph.replay()
    assert torch.equal(out, scatter_moe(x, gate_up, down, index, weights))


def test_compiled_by_inductor():
    inputs = on_gpu(T=200, dtype=torch.bfloat16)
    compiled = torch.compile(scatter_moe, fullgraph=True)
    truth = run_with_gradients(scatter_moe, *inputs)
    for a, b in zip(run_with_gradients(compiled, *inputs), truth, strict=True):
        assert torch.equal(a, b)


def test_peak_memory_is_the_results_and_one_stage():
    tokens = 4096
    tensors, index = on_gpu(T=tokens, dtype=torch.bfloat16, **QWEN3)
    leaves = [t.requires_grad_() for t in tensors]
    scatter_moe(*leaves[:3], index, leaves[3]).sum().backward()
    for leaf in leaves:
        leaf.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = scatter_moe(*leaves[:3], index, leaves[3])
    rows, mib = tokens * 8, 2**20
    hidden, routing = rows * 1536 * 2, rows * 8
    kept = torch.cuda.memory_allocated() - before
    assert kept <= hidden + routing + out.nbytes + mib
    out.sum().backward()
    weights = sum(leaf.nbytes for leaf in leaves[1:3])
    # Backward at its peak: hidden, its gradient, the weights' gradients and one product's rows.
    limit = 2 * hidden + weights + rows * 2048 * 2 + 4 * out.nbytes + 16 * mib
    assert torch.cuda.max_memory_allocated() - before <= limit


def test_twenty_steps_follow_the_curve_of_grouped_mm(tiny_moe, tokenizer, tmp_path):
    curves = {}
    for experts in ("grouped_mm", "scatter_moe"):
        others = [name for name in PATCHES if name != "scatter_moe"]
        names = [*others, *([experts] if experts == "scatter_moe" else [])]
        trainer = make_trainer(
            copy.deepcopy(tiny_moe), tokenizer, tmp_path / experts, max_steps=20, use_cpu=False,
            bf16=True, documents=Documents(6, len(tokenizer)), patches=names,
        )  # fmt: skip
        trainer.train()
        lines = (tmp_path / experts / "metrics.jsonl").open()
        curves[experts] = [json.loads(line)["loss"] for line in lines]
    assert curves["scatter_moe"] == pytest.approx(curves["grouped_mm"], rel=2e-2)
    assert curves["scatter_moe"][-1] < 0.9 * curves["scatter_moe"][0]


def test_all_stages_have_a_cut_for_this_gpu():
    for stage in STAGES:
        key = tile_table.architecture_of(torch.empty(1, device="cuda"))
        assert choose_tiles(stage, key, torch.bfloat16, 2048).num_warps >= 4

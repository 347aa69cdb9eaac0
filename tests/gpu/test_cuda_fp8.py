"""FP8 as a GPU computes it: the noise of products and gradients, compiled or not, no waiting."""

from functools import partial

import pytest
import torch

from monkey_patch.kernels.scatter_moe import scatter_moe
from monkey_patch.kernels.scatter_moe.reference import scatter_moe_reference
from monkey_patch.linear_fp8 import Fp8Forward, fp8_linear, make_scaling
from tests.monkey_patch.kernels.experts import NAMES, make_inputs, run_with_gradients
from tests.support.oracle import assert_close

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
        reason="needs a CUDA device with FP8",
    ),
]
# As on a CPU, tests/monkey_patch/kernels/test_scatter_moe_fp8.py and test_linear_fp8.py.
CHAIN_SNR, PRODUCT_SNR = 22.0, 24.0
SCALINGS = [
    "blockwise",
    "rowwise",
    pytest.param(
        "mxfp8",
        marks=pytest.mark.skipif(
            not torch.cuda.is_available() or torch.cuda.get_device_capability() < (10, 0),
            reason="needs a CUDA device with block scales (sm_100)",
        ),
    ),
]


def snr(actual, truth):
    actual, truth = actual.double().cpu(), truth.double().cpu()
    return 10 * torch.log10(truth.square().sum() / (actual - truth).square().sum()).item()


@pytest.mark.parametrize("sizes", [
    {"T": 300, "E": 8, "K": 2, "D": 256, "F": 384},
    {"T": 77, "E": 8, "K": 2, "D": 272, "F": 200},
    {"T": 4096, "E": 128, "K": 8, "D": 2048, "F": 768},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_experts(sizes, recompute, scaling):
    tensors, index = make_inputs(**sizes)
    tensors, index = [t.cuda() for t in tensors], index.cuda()
    truth = run_with_gradients(scatter_moe_reference, tensors, index, torch.float64)
    op = partial(scatter_moe, fp8=scaling, recompute_hidden=recompute)
    found = run_with_gradients(op, tensors, index, torch.bfloat16)
    again = run_with_gradients(op, tensors, index, torch.bfloat16)
    for name, a, b, e in zip(("out", *NAMES), found, again, truth, strict=True):
        assert snr(a, e) > CHAIN_SNR, name
        assert torch.equal(a, b), f"{name} differs from run to run"


@pytest.mark.parametrize("scaling", SCALINGS)
def test_the_experts_are_those_of_the_emulation(scaling):
    tensors, index = make_inputs(T=300, E=8, K=2, D=256, F=384)
    op = partial(scatter_moe, fp8=scaling)
    here = run_with_gradients(op, tensors, index, torch.bfloat16)
    there = run_with_gradients(op, [t.cuda() for t in tensors], index.cuda(), torch.bfloat16)
    for name, a, e in zip(("out", *NAMES), there, here, strict=True):
        assert_close(a.cpu(), e, name=name)


@pytest.mark.parametrize("recipe", ["rowwise", "tensorwise", "rowwise_with_gw_hp"])
@pytest.mark.parametrize("rows", [64, 4099])
def test_linear(recipe, rows):
    linear = torch.nn.Linear(2048, 512, bias=False, dtype=torch.bfloat16, device="cuda")
    scaling = make_scaling(recipe)
    x = torch.randn(rows, 2048, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    d_out = torch.randn(rows, 512, dtype=torch.bfloat16, device="cuda")
    results = {}
    for name, forward in {
        "eager": lambda x: fp8_linear(x, linear.weight, None, scaling),
        "compiled": Fp8Forward(linear, scaling).forward,
    }.items():
        out = forward(x)
        results[name] = (out, *torch.autograd.grad(out, (x, linear.weight), d_out))
    truth = (
        x.double() @ linear.weight.double().T, d_out.double() @ linear.weight.double(),
        d_out.double().T @ x.double(),
    )  # fmt: skip
    for name, found in results.items():
        for part, a, e in zip(("out", "d_x", "d_weight"), found, truth, strict=True):
            assert snr(a.detach(), e.detach()) > PRODUCT_SNR, (name, part)


def test_a_pass_waits_for_nothing():
    tensors, index = make_inputs(T=512, E=8, K=2, D=256, F=384)
    tensors = [t.cuda().to(torch.bfloat16).requires_grad_() for t in tensors]
    index = index.cuda()
    scatter_moe(*tensors[:3], index, tensors[3], fp8="blockwise").sum().backward()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        scatter_moe(*tensors[:3], index, tensors[3], fp8="blockwise").sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")

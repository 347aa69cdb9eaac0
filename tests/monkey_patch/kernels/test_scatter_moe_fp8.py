"""The op in FP8: noise of each product and gradient, what must not change, non-finite values."""

from functools import partial

import pytest
import torch

from monkey_patch.kernels.scatter_moe import scatter_moe
from monkey_patch.kernels.scatter_moe.plain import PlainStages
from monkey_patch.kernels.scatter_moe.plain_fp8 import (
    PlainFp8Stages,
    PlainMxFp8Stages,
    PlainRowwiseFp8Stages,
)
from monkey_patch.kernels.scatter_moe.quantize import HiddenGradient, dequantize
from monkey_patch.kernels.scatter_moe.reference import scatter_moe_reference
from tests.monkey_patch.kernels.experts import NAMES, make_inputs, run_with_gradients
from tests.monkey_patch.kernels.fp8_cases import fp8_reference
from tests.support.oracle import assert_close

STAGES = {"blockwise": PlainFp8Stages, "rowwise": PlainRowwiseFp8Stages, "mxfp8": PlainMxFp8Stages}
SCALINGS = list(STAGES)

# Decibels. An operand in e4m3 has 31.5 for values of all magnitudes (test_quantize.py), a product
# of two therefore 28.5. out and the gradient of x pass two products and SwiGLU, which depends on
# its inputs about quadratically: as much again twice, 22.5. Measured 23.9 to 28. In mxfp8, whose
# powers of two leave up to half of the range unused, heavy tails have no more: 22.49 and above.
PRODUCT_SNR = 28.0
CHAIN_SNR = {"blockwise": 22.5, "rowwise": 22.5, "mxfp8": 22.0}


def snr(actual, truth):
    truth = truth.detach().double()
    noise = (actual.detach().double() - truth).square().sum()
    return 10 * torch.log10(truth.square().sum() / noise).item()


def values(tail, *shape):
    if tail == "heavy":
        return torch.distributions.StudentT(torch.tensor(3.0)).sample(shape)
    x = torch.randn(shape)
    if tail == "outlier":
        x.view(-1)[7] = 3e3
    return x


def block_inputs(tail="gauss", dtype=torch.bfloat16, T=150, D=272, F=200, E=4, K=2):
    """More than one block in every width, the last one shorter, one expert without a token."""
    index = torch.rand(T, E - 1).argsort(dim=1)[:, :K]
    weight = "heavy" if tail == "heavy" else "gauss"
    tensors = [
        values(tail, T, D), values(weight, E, 2 * F, D) * D**-0.5,
        values(weight, E, D, F) * F**-0.5, torch.rand(T, K),
    ]  # fmt: skip
    return [t.to(dtype) for t in tensors], index


def assert_is_the_definition(tensors, index, scaling, **options):
    """Compare to 1e-3, where FP8 makes 5e-2: what lies between two values may go either way."""
    reference = partial(fp8_reference, scaling=scaling)
    truth = run_with_gradients(reference, tensors, index, torch.float32)
    got = run_with_gradients(partial(scatter_moe, fp8=scaling, **options), tensors, index)
    for name, a, e in zip(("out", *NAMES), got, truth, strict=True):
        assert_close(a, e, name=name, rms=1e-3)
    return got


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("tail", ["gauss", "heavy", "outlier"])
def test_output_and_gradients_against_float64(tail, scaling):
    tensors, index = block_inputs(tail)
    truth = run_with_gradients(scatter_moe_reference, tensors, index, torch.float64)
    got = run_with_gradients(partial(scatter_moe, fp8=scaling), tensors, index)
    exact = run_with_gradients(scatter_moe, tensors, index)
    for name, a, b, e in zip(("out", *NAMES), got, exact, truth, strict=True):
        rest = (
            slice(1, None) if len(e) == len(index) else slice(None)
        )  # all but the outlier's token
        assert snr(a[rest], e[rest]) > CHAIN_SNR[scaling], name
        assert snr(a[rest], e[rest]) < 40 < snr(b[rest], e[rest]), f"{name} was not in FP8"
        assert snr(a, e) > CHAIN_SNR[scaling] - 6, f"{name} of the outlier"


def stage_products(scaling, tensors, index, dtype):
    """Yield each product of the FP8 stages with what float64 gives for the same inputs."""
    x, gate_up, down, weights = tensors
    routing = PlainStages.sort_by_expert(index, len(down))
    exact = PlainStages(routing, index.shape[1])
    stages = STAGES[scaling](routing, index.shape[1])
    wide = [t.double() for t in tensors]
    both = {"forward": True, "backward": True}
    quantized = [stages.quantize_weight(w, **both) for w in (gate_up, down)]

    hidden, _ = stages.up(x, quantized[0], hidden=True, act=False)
    yield "up", hidden, exact.up(wide[0], wide[1], hidden=True, act=False)[0]
    act = values("gauss", len(routing.slot_of_row), down.shape[2]).to(dtype)
    yield (
        "down",
        stages.down(stages.quantize_rows(act), quantized[1]),
        exact.down(act.double(), wide[2]),
    )
    d_hidden = values("gauss", *hidden.shape).to(dtype)
    yield (
        "input_gradient",
        stages.input_gradient(
            HiddenGradient(d_hidden, stages.quantize_rows(d_hidden)), quantized[0]
        ),
        exact.input_gradient(d_hidden.double(), wide[1]),
    )
    # The half of d_hidden that is linear in the product.
    arguments = {"act": False, "overwrite": False}
    got, _, _ = stages.activation_gradient(x, quantized[1], hidden, weights, **arguments)
    truth, _, _ = exact.activation_gradient(wide[0], wide[2], hidden.double(), wide[3], **arguments)
    yield "activation_gradient", got.full.chunk(2, dim=1)[1], truth.chunk(2, dim=1)[1]


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("tail", ["gauss", "heavy"])
def test_each_product_against_float64(tail, scaling):
    dtype = torch.bfloat16
    tensors, index = block_inputs(tail)
    for name, got, truth in stage_products(scaling, tensors, index, dtype):
        assert snr(got, truth) > PRODUCT_SNR, name


def test_a_block_keeps_an_outlier_from_the_rest_of_its_row():
    """Its product is removed, so that what is left is the rest: 2 of 3 or 11 of 12 blocks."""
    (x, gate_up, down, _), index = block_inputs(D=384)
    x[:, 5], gate_up[:, :, 5] = 1e7, 0.0
    routing = PlainStages.sort_by_expert(index, len(down))
    truth = PlainStages(routing, 2).up(x.double(), gate_up.double(), hidden=True, act=False)[0]
    noise = {}
    for scaling, stages in STAGES.items():
        weight = stages(routing, 2).quantize_weight(gate_up, forward=True, backward=False)
        got = stages(routing, 2).up(x, weight, hidden=True, act=False)[0]
        noise[scaling] = snr(got, truth)
    assert noise["blockwise"] > 10 * torch.log10(torch.tensor(3.0)) - 1
    assert noise["rowwise"] < 1
    assert noise["mxfp8"] > 10 * torch.log10(torch.tensor(12.0)) - 1


def test_weight_gradients_are_products_in_bfloat16():
    """From the same hidden and d_out they have the noise of bfloat16, not of FP8."""
    tensors, index = block_inputs()
    x, _, down, weights = tensors
    routing = PlainStages.sort_by_expert(index, len(down))
    exact, stages = PlainStages(routing, 2), PlainFp8Stages(routing, 2)
    hidden = values("gauss", index.numel(), 2 * down.shape[2]).bfloat16()
    d_hidden, scaled_act, _ = stages.activation_gradient(
        x, stages.quantize_weight(down, forward=False, backward=True), hidden, weights,
        act=True, overwrite=False,
    )  # fmt: skip
    assert_close(dequantize(*d_hidden.quantized[:2]), d_hidden.full, rms=0.04)
    got, truth = torch.empty(4, 400, 272, dtype=torch.bfloat16), torch.empty(4, 400, 272).double()
    stages.gate_up_gradient(d_hidden, x, got, accumulate=False)
    exact.gate_up_gradient(d_hidden.full.double(), x.double(), truth, accumulate=False)
    assert snr(got, truth) > 45
    got, truth = torch.empty(4, 272, 200, dtype=torch.bfloat16), torch.empty(4, 272, 200).double()
    stages.down_gradient(x, scaled_act, got, accumulate=False)
    exact.down_gradient(x.double(), scaled_act.double(), truth, accumulate=False)
    assert snr(got, truth) > 45


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize(
    "index",
    [
        torch.full((24, 1), 5),
        torch.tensor([[0, 7], [7, 8], [8, 8], [9, -1]]),
        torch.full((4, 2), 8),
        torch.tensor([[3, 3], [2, 2]]),
        torch.zeros(0, 2, dtype=torch.long),
    ],
    ids=["one expert", "sentinels", "sentinels only", "an expert twice", "no tokens"],
)
@pytest.mark.usefixtures("poisoned")
def test_unusual_routing(index, scaling):
    tensors, _ = make_inputs(T=len(index), K=index.shape[1])
    out, d_x, d_gate_up, d_down, d_weights = assert_is_the_definition(tensors, index, scaling)
    is_routed = (index >= 0) & (index < 8)
    assert (d_weights[~is_routed] == 0).all()
    assert (out[~is_routed.any(dim=1)] == 0).all()
    assert (d_x[~is_routed.any(dim=1)] == 0).all()
    unused = [e for e in range(8) if not (index == e).any()]
    assert (d_gate_up[unused] == 0).all()
    assert (d_down[unused] == 0).all()


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize(("D", "F", "E"), [(50, 30, 8), (63, 33, 5), (130, 129, 3), (16, 1, 1)])
def test_odd_sizes(D, F, E, scaling):
    assert_is_the_definition(*make_inputs(D=D, F=F, E=E, K=1), scaling)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("recompute", [False, True])
def test_the_definition_at_several_blocks(recompute, scaling):
    tensors, index = block_inputs(dtype=torch.float32)
    assert_is_the_definition(tensors, index, scaling, recompute_hidden=recompute)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_zeros_in_zeros_out(scaling):
    tensors, index = make_inputs(dtype=torch.bfloat16)
    tensors[0].zero_()
    got = run_with_gradients(partial(scatter_moe, fp8=scaling), tensors, index)
    for name, tensor in zip(("out", *NAMES), got, strict=True):
        assert torch.isfinite(tensor).all(), name
    assert all((got[i] == 0).all() for i in (0, 2, 3, 4))


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_what_is_not_finite_without_fp8_is_not_finite_with_it(position, bad, scaling):
    tensors, index = block_inputs(T=20, K=1)
    index[:3] = 0
    index[3:] = torch.where(index[3:] == 0, 1, index[3:])
    tensors[position].view(-1)[9] = bad  # of token or expert 0
    exact, got = (
        run_with_gradients(partial(scatter_moe, fp8=fp8), tensors, index)
        for fp8 in ("off", scaling)
    )
    assert not torch.isfinite(exact[0]).all()
    for name, a, e in zip(("out", *NAMES), got, exact, strict=True):
        assert not torch.isfinite(a[~torch.isfinite(e)]).any(), name
    others = slice(1 if position == 0 else 3, None)
    assert torch.isfinite(got[0][others]).all(), "tokens that never meet the value"


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_gradient_that_is_not_finite_stays_so(scaling):
    tensors, index = block_inputs(T=20)
    gradients = {}
    for fp8 in ("off", scaling):
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = scatter_moe(*leaves[:3], index, leaves[3], fp8=fp8)
        direction = torch.ones_like(out)
        direction[4, 2] = torch.inf
        gradients[fp8] = torch.autograd.grad(out, leaves, direction)
    for name, a, e in zip(NAMES, gradients[scaling], gradients["off"], strict=True):
        assert not torch.isfinite(e).all(), name
        assert not torch.isfinite(a[~torch.isfinite(e)]).any(), name


@pytest.mark.parametrize("scaling", SCALINGS)
def test_two_runs_and_recomputed_hidden_are_bit_equal(scaling):
    inputs = block_inputs()
    first, again, recomputed = (
        run_with_gradients(partial(scatter_moe, fp8=scaling, recompute_hidden=r), *inputs)
        for r in (False, False, True)
    )
    for name, a, b, c in zip(("out", *NAMES), first, again, recomputed, strict=True):
        assert torch.equal(a, b), name
        assert torch.equal(a, c), name

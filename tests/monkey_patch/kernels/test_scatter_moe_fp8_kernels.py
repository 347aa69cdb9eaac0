"""The FP8 kernels in the interpreter: bits of what they quantise, each stage, the op, its edges."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from monkey_patch.kernels.scatter_moe import block, scatter_moe
from monkey_patch.kernels.scatter_moe.plain_fp8 import (
    PlainFp8Stages,
    PlainMxFp8Stages,
    PlainRowwiseFp8Stages,
)
from monkey_patch.kernels.scatter_moe.quantize import (
    BLOCK,
    Quantized,
    dequantize,
    quantize_rows,
    quantize_weight_layouts,
)
from monkey_patch.kernels.scatter_moe.triton.fp8 import stages as fp8_stages
from monkey_patch.kernels.scatter_moe.triton.fp8.scaling import fit
from monkey_patch.kernels.scatter_moe.triton.fp8.stages import BY_SCALING
from monkey_patch.kernels.scatter_moe.triton.stages import TritonStages
from tests.monkey_patch.kernels.experts import NAMES, make_inputs, run_with_gradients
from tests.monkey_patch.kernels.fp8_cases import CUT, assert_same_bits, edges
from tests.support.interpreter import use_kernels
from tests.support.oracle import assert_close

pytestmark = pytest.mark.kernel

PLAIN = {"blockwise": PlainFp8Stages, "rowwise": PlainRowwiseFp8Stages, "mxfp8": PlainMxFp8Stages}
SCALINGS = list(PLAIN)


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    use_kernels(monkeypatch)


@pytest.fixture
def empty_routing():
    return TritonStages.sort_by_expert(torch.zeros(0, 1, dtype=torch.int64), 1)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("width", [1, 48, 128, 300, 2176])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows_have_the_bits_of_the_definition(empty_routing, dtype, width, scaling):
    x = edges(19, width, dtype)
    got = BY_SCALING[scaling](empty_routing, 1).quantize_rows(x)
    assert got.dtype == dtype
    assert_same_bits(got, quantize_rows(x, scaling))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("layouts", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("shape", [(2, 140, 130), (3, 16, 40)])
def test_weights_have_the_bits_of_the_definition(empty_routing, shape, layouts, scaling):
    forward, backward = layouts
    stages = BY_SCALING[scaling](empty_routing, 1)
    w = edges(shape[0] * shape[1], shape[2], torch.bfloat16).view(shape)
    for weight in (w, w.float().mT.contiguous().mT):
        got = stages.quantize_weight(weight, forward=forward, backward=backward)
        expected = quantize_weight_layouts(weight, scaling, forward=forward, backward=backward)
        for a, e in zip(got, expected, strict=True):
            assert (a is None) == (e is None)
            if e is not None:
                assert_same_bits(a, e)


class Block:
    """Inputs of one block and a routing with a fifth of the choices outside the experts."""

    def __init__(self, hidden=272, width=144, dtype=torch.float32):
        tokens, experts, top_k = 24, 2, 2
        index = torch.randint(0, experts + 1, (tokens, top_k))
        index[:3, 0] = torch.tensor([-1, 2**30, experts])
        self.routing = TritonStages.sort_by_expert(index, experts)
        self.routed = int(self.routing.offsets[-1])
        self.weights = torch.rand(tokens, top_k)
        shapes = ((tokens, hidden), (tokens, hidden), (tokens * top_k, 2 * width))
        self.x, self.d_out, self.hidden = (torch.randn(s).to(dtype) for s in shapes)
        self.act = torch.randn(tokens * top_k, width).to(dtype)
        self.gate_up = (torch.randn(experts, 2 * width, hidden) / hidden**0.5).to(dtype)
        self.down = (torch.randn(experts, hidden, width) / width**0.5).to(dtype)

    def act_of_up(self, cut, scaling):
        """Return the quantised act of the rows that have an expert."""
        stages = BY_SCALING[scaling](self.routing, 2)
        stages.tiles = lambda stage, operand: cut
        weight = stages.quantize_weight(self.gate_up, forward=True, backward=False)
        _, act = stages.up(self.x, weight, hidden=False, act=True)
        return Quantized(*(t[: self.routed] for t in act[:2]))

    def run(self, kind, cut=None):
        """Return each stage's result for the same inputs."""
        stages = kind(self.routing, 2)
        if cut is not None:
            stages.tiles = lambda stage, operand: cut
        both = {"forward": True, "backward": True}
        gate_up, down = (stages.quantize_weight(w, **both) for w in (self.gate_up, self.down))
        hidden, act = stages.up(self.x, gate_up, hidden=True, act=True)
        alone = stages.up(self.x, gate_up, hidden=False, act=True)[1]
        y = stages.down(stages.quantize_rows(self.act), down)
        d_hidden, scaled_act, d_weights = stages.activation_gradient(
            self.d_out, down, self.hidden.clone(), self.weights, act=True, overwrite=True
        )
        rows = stages.input_gradient(
            d_hidden._replace(quantized=stages.quantize_rows(self.hidden)), gate_up
        )
        by_row = {
            "hidden": hidden, "act": dequantize(*act[:2]), "y": y, "d_hidden": d_hidden.full,
            "scaled_act": scaled_act, "rows": rows,
        }  # fmt: skip
        found = {name: t[: self.routed] for name, t in by_row.items()} | {"d_weights": d_weights}
        quantized = [
            Quantized(*(t[: self.routed] for t in q[:2])) for q in (act, alone, d_hidden.quantized)
        ]
        return found, quantized


# Of what lies between two numbers of e4m3 a last bit decides: act may be a number beside it.
LIMITS = {"act": 1e-3}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("width", "cut", "scaling"),
    [
        (144, CUT, "blockwise"),
        (144, CUT, "rowwise"),
        (136, CUT, "blockwise"),  # rows of act are not aligned for TMA
        (256, CUT, "blockwise"),
        (256, replace(CUT, block_n=256, block_k=64, epilogue_n=128), "blockwise"),
        (144, replace(CUT, block_m=64, block_n=64, tma=False), "blockwise"),
        (40, replace(CUT, block_m=16, block_n=32, block_k=32, epilogue_n=16), "blockwise"),
        (40, replace(CUT, tma=False), "rowwise"),
        (144, CUT, "mxfp8"),
        (256, replace(CUT, block_n=64, epilogue_n=64), "mxfp8"),
        (144, replace(CUT, block_m=64, block_k=64, tma=False), "mxfp8"),
        (40, replace(CUT, block_m=16, block_n=32, block_k=32, epilogue_n=16), "mxfp8"),
    ],
)
def test_stages_compute_what_the_plain_ones_do(width, cut, scaling):
    case = Block(hidden=272 if width > BLOCK else 48, width=width)
    expected, _ = case.run(PLAIN[scaling])
    got, (act, alone, d_hidden) = case.run(BY_SCALING[scaling], cut)
    for name, value in got.items():
        assert_close(value, expected[name], name=name, rms=LIMITS.get(name, 2e-6))
    assert_same_bits(alone, act)
    assert_same_bits(d_hidden, quantize_rows(got["d_hidden"], scaling))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("width", "dtype", "scaling"),
    [
        (256, torch.bfloat16, "blockwise"), (144, torch.float32, "blockwise"),
        (256, torch.bfloat16, "mxfp8"), (144, torch.float32, "mxfp8"),
    ],
)  # fmt: skip
def test_act_quantised_in_the_epilogue_has_the_bits_of_a_pass_of_its_own(
    monkeypatch, width, dtype, scaling
):
    case = Block(hidden=48, width=width, dtype=dtype)
    calls = []

    def apart(*arguments):
        calls.append(is_fused := quantizes_act(*arguments))
        assert is_fused
        return False

    quantizes_act = fp8_stages.quantizes_act
    fused = case.act_of_up(CUT, scaling)
    monkeypatch.setattr(fp8_stages, "quantizes_act", apart)
    assert_same_bits(fused, case.act_of_up(CUT, scaling))
    assert len(calls) == 1


def test_a_block_of_gate_that_ends_in_up_is_quantised_apart():
    quantizes = fp8_stages.quantizes_d_hidden
    assert quantizes(256, CUT, "blockwise")
    assert not quantizes(144, CUT, "blockwise")
    assert not quantizes(256, replace(CUT, block_n=64), "blockwise")
    assert not quantizes(256, CUT, "rowwise")
    assert quantizes(160, replace(CUT, block_n=64), "mxfp8")
    assert not quantizes(144, CUT, "mxfp8")


def test_half_a_block_of_act_is_quantised_apart():
    """In mxfp8 each half of a tile is stored by itself."""
    assert fp8_stages.quantizes_act(64, CUT, "mxfp8")
    assert not fp8_stages.quantizes_act(32, CUT, "mxfp8")
    assert not fp8_stages.quantizes_act(144, replace(CUT, block_n=32), "mxfp8")


def plain_and_kernels(tensors, index, scaling, **options):
    """Return what the op gives without and with the kernels."""
    results = []
    for kinds in (PLAIN, BY_SCALING):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(block, "_fp8_backend", lambda x, fp8, kinds=kinds: kinds[fp8])
            op = partial(scatter_moe, fp8=scaling, **options)
            results.append(run_with_gradients(op, tensors, index))
    return results


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize(("D", "F", "E", "K"), [(144, 136, 2, 2), (50, 30, 8, 1), (16, 1, 1, 1)])
def test_output_and_gradients(D, F, E, K, scaling):
    tensors, index = make_inputs(T=12, D=D, F=F, E=E, K=K)
    expected, got = plain_and_kernels(tensors, index, scaling)
    for name, a, e in zip(("out", *NAMES), got, expected, strict=True):
        assert_close(a, e, name=name, rms=1e-3)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit(dtype):
    """Plain torch rounds act twice, kernels once: some values end in another number of e4m3."""
    inputs = make_inputs(T=12, E=2, D=144, F=128, dtype=dtype)
    for name, a, e in zip(("out", *NAMES), *plain_and_kernels(*inputs, "blockwise"), strict=True):
        assert_close(a, e, name=name, rms=2e-2)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize(
    "index",
    [
        torch.full((8, 1), 5),
        torch.tensor([[0, 7], [7, 8], [8, 8], [9, -1]]),
        torch.full((4, 2), 8),
        torch.tensor([[3, 3], [2, 2]]),
        torch.zeros(0, 2, dtype=torch.long),
    ],
    ids=["one expert", "sentinels", "sentinels only", "an expert twice", "no tokens"],
)
def test_unusual_routing(index, scaling):
    tensors, _ = make_inputs(T=len(index), K=index.shape[1])
    expected, got = plain_and_kernels(tensors, index, scaling)
    for name, a, e in zip(("out", *NAMES), got, expected, strict=True):
        assert_close(a, e, name=name, rms=1e-3)
        assert torch.equal(a == 0, e == 0), name


@pytest.mark.parametrize("scaling", SCALINGS)
def test_two_runs_and_recomputed_hidden_are_bit_equal(scaling):
    tensors, index = make_inputs(T=20, E=2, dtype=torch.bfloat16)
    runs = [
        run_with_gradients(
            partial(scatter_moe, fp8=scaling, recompute_hidden=recompute), tensors, index
        )
        for recompute in (False, False, True)
    ]
    for name, first, again, recomputed in zip(("out", *NAMES), *runs, strict=True):
        assert torch.equal(first, again), name
        assert torch.equal(first, recomputed), name


@pytest.mark.parametrize("scaling", ["blockwise", "mxfp8"])
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_what_is_not_finite_spreads_as_in_the_definition(position, bad, scaling):
    tensors, _ = make_inputs(T=12, E=3, dtype=torch.bfloat16)
    index = torch.tensor([0, 0, *[1, 2] * 5])[:, None].expand(12, 2).contiguous()
    tensors[position].view(-1)[9] = bad  # of token or expert 0
    expected, got = plain_and_kernels(tensors, index, scaling)
    for name, a, e in zip(("out", *NAMES), got, expected, strict=True):
        assert torch.equal(a.isfinite(), e.isfinite()), name
    assert not got[0].isfinite().all()
    assert got[0][2:].isfinite().all()


def test_cuts_that_cannot_be_right_are_refused():
    with pytest.raises(ValueError, match="block_k is 256, but a scale holds for 128"):
        fit(replace(CUT, block_k=256), 512, 512)
    with pytest.raises(ValueError, match="persistent is true"):
        fit(replace(CUT, persistent=True), 512, 512)
    assert fit(CUT, 512, 8).block_k == 32, "the least depth of an FP8 product"

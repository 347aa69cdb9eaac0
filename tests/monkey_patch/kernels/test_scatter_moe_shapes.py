"""The block at the proportions of other models than Qwen3-30B-A3B, interpreted, against float64."""

import pytest
import torch

from monkey_patch.kernels.scatter_moe import scatter_moe
from monkey_patch.kernels.scatter_moe.reference import scatter_moe_reference
from monkey_patch.kernels.scatter_moe.triton import activation_gradient, product
from monkey_patch.kernels.scatter_moe.triton.tiles import choose_tiles
from tests.monkey_patch.kernels.experts import NAMES, make_inputs, run_with_gradients
from tests.support.interpreter import use_kernels
from tests.support.oracle import assert_close

pytestmark = pytest.mark.kernel

# Tiles here are 64 columns and 32 deep: a 64th of the 480B has 2F = 80, which is neither.
SHAPES = {
    "235B": {"T": 9, "E": 8, "K": 8, "D": 128, "F": 48},
    "480B": {"T": 9, "E": 10, "K": 8, "D": 96, "F": 40},
    "35B": {"T": 7, "E": 16, "K": 8, "D": 64, "F": 16},
    "Next": {"T": 5, "E": 32, "K": 10, "D": 64, "F": 16},
    "neither": {"T": 9, "E": 3, "K": 3, "D": 72, "F": 44},
    "all experts": {"T": 5, "E": 512, "K": 10, "D": 64, "F": 16},
}
LONG = ("all experts",)


@pytest.mark.parametrize(
    "sizes",
    [pytest.param(s, id=n, marks=[pytest.mark.long] * (n in LONG)) for n, s in SHAPES.items()],
)
@pytest.mark.usefixtures("poisoned")
def test_forward_and_gradients(sizes, monkeypatch):
    use_kernels(monkeypatch)
    tensors, index = make_inputs(**sizes)
    truth = run_with_gradients(scatter_moe_reference, tensors, index, torch.float64)
    found = run_with_gradients(scatter_moe, tensors, index)
    for name, a, e in zip(("out", *NAMES), found, truth, strict=True):
        assert_close(a, e, name=name)


def integers(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("depth", [16, 40, 80, 104])
def test_tma_reads_weights_of_any_depth_and_no_neighbour(depth, monkeypatch):
    """The two products that sum over the rows of a weight; the other experts' weights are NaN."""
    use_kernels(monkeypatch)
    rows, width = 20, 24
    tiles = choose_tiles("input_gradient", "interpreter", torch.float32, rows)
    weight = torch.full((3, depth, width), torch.nan)
    weight[1] = torch.randn(depth, width)
    rows_in, row_tiles = torch.randn(rows, depth), integers([1], [0], [rows], [1])
    out = torch.full((rows, width), torch.nan)
    launch = product.product_launch(rows_in, weight, out, row_tiles, tiles, transposed=False)
    assert launch.arguments["TMA"]
    launch.run()
    truth = rows_in.double() @ weight[1].double()
    assert_close(out, truth)

    hidden, ones = torch.randn(rows, 2 * width), torch.ones(rows, 1)
    partial = torch.zeros(activation_gradient.num_partials(width, tiles), rows)
    d_hidden, slots = torch.empty_like(hidden), torch.arange(rows, dtype=torch.int32)
    launch = activation_gradient.activation_gradient_launch(
        rows_in, weight, hidden, ones, d_hidden, None, partial, slots, row_tiles, tiles
    )
    assert launch.arguments["TMA"]
    launch.run()
    gate, up = hidden.double().chunk(2, dim=-1)
    act = torch.nn.functional.silu(gate) * up
    assert_close(partial.sum(dim=0), (truth * act).sum(dim=-1))
    assert_close(d_hidden[:, width:], truth * torch.nn.functional.silu(gate))

"""Single kernels in the interpreter: the sort, the tiles, every way to cut and launch a stage."""

from dataclasses import replace

import pytest
import torch

from monkey_patch.kernels.scatter_moe.plain import PlainStages
from monkey_patch.kernels.scatter_moe.routing import Routing
from monkey_patch.kernels.scatter_moe.triton import routing as kernels
from monkey_patch.kernels.scatter_moe.triton.activation_gradient import activation_gradient_launch
from monkey_patch.kernels.scatter_moe.triton.combine import combine_launch
from monkey_patch.kernels.scatter_moe.triton.product import product_launch
from monkey_patch.kernels.scatter_moe.triton.rows import RowTiles
from monkey_patch.kernels.scatter_moe.triton.stages import TritonStages
from monkey_patch.kernels.scatter_moe.triton.tiles import Tiles
from monkey_patch.kernels.scatter_moe.triton.up import up_launch
from monkey_patch.kernels.scatter_moe.triton.weight_gradient import weight_gradient_launch
from tests.support.interpreter import use_kernels
from tests.support.oracle import assert_close

pytestmark = pytest.mark.kernel
SMALL = Tiles(block_m=16, block_n=16, block_k=16, num_warps=4, num_stages=1)


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    use_kernels(monkeypatch)


def random_index(tokens, experts, top_k):
    """A fifth of the choices is no expert: E, more, or negative."""
    index = torch.randint(0, experts, (tokens, top_k))
    foreign = torch.tensor([experts, experts + 3, 2**30, -1])
    is_foreign = torch.rand(tokens, top_k) < 0.2
    return torch.where(is_foreign, foreign[torch.randint(0, 4, (tokens, top_k))], index)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"),
    [(1, 1, 1), (7, 3, 2), (200, 128, 8), (3000, 5, 4), (90, 200, 10), (0, 4, 2)],
)
def test_sort_is_the_stable_sort(tokens, experts, top_k, dtype):
    index = random_index(tokens, experts, top_k).to(dtype)
    got = TritonStages.sort_by_expert(index, experts)
    flat = index.reshape(-1).tolist()
    order = [n for e in range(experts) for n in range(len(flat)) if flat[n] == e]
    ends = torch.tensor([sum(0 <= f < e for f in flat) for e in range(experts + 1)])
    assert torch.equal(got.offsets.long(), ends)
    assert got.slot_of_row[: len(order)].tolist() == order
    rows = [-1] * len(flat)
    for row, slot in enumerate(order):
        rows[slot] = row
    assert got.row_of_slot.tolist() == rows


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(7, 3, 2), (200, 128, 8), (0, 4, 2)])
def test_plain_sort_agrees(tokens, experts, top_k):
    index = random_index(tokens, experts, top_k)
    got, truth = (f.sort_by_expert(index, experts) for f in (TritonStages, PlainStages))
    routed = int(truth.offsets[-1])
    assert torch.equal(got.offsets, truth.offsets)
    assert torch.equal(got.row_of_slot, truth.row_of_slot)
    assert torch.equal(got.slot_of_row[:routed], truth.slot_of_row[:routed])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("block_m", [16, 64])
def test_row_tiles_cover_every_row_once(block_m):
    sizes = [0, 5, 16, 17, 0, 100, 64, 0]
    offsets = torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)
    slots = torch.zeros(sum(sizes) + 9, dtype=torch.int32)  # nine rows belong to no expert
    tiles = RowTiles(Routing(offsets, slots, slots)).map(block_m)
    expected = [
        (e, int(offsets[e]) + m, int(offsets[e + 1]))
        for e, size in enumerate(sizes)
        for m in range(0, size, block_m)
    ]
    assert [tuple(t) for t in tiles[:3].T.tolist()[: len(expected)]] == expected
    assert (tiles[0, len(expected) :] == len(sizes)).all()
    assert (tiles[3] == len(expected)).all()


@pytest.fixture
def block():
    """One pass of the block on the kernels; calling it with tiles returns all its results."""
    tokens, experts, top_k, hidden, width = 50, 4, 2, 48, 32
    index = random_index(tokens, experts, top_k)
    x, d_out = torch.randn(tokens, hidden), torch.randn(tokens, hidden)
    weights = torch.rand(tokens, top_k)
    gate_up = torch.randn(experts, 2 * width, hidden)
    down = torch.randn(experts, hidden, width)
    routing = TritonStages.sort_by_expert(index, experts)
    routed = int(routing.offsets[-1])

    def run(tiles):
        stages = TritonStages(routing, top_k)
        stages.tiles = lambda stage, operand: tiles
        hidden_rows, act = stages.up(x, gate_up, hidden=True, act=True)
        y = stages.down(act, down)
        d_hidden, scaled, d_weights = stages.activation_gradient(
            d_out, down, hidden_rows, weights, act=True, overwrite=False
        )
        rows = stages.input_gradient(d_hidden, gate_up)
        d_gate_up, d_down = torch.empty_like(gate_up), torch.empty_like(down)
        stages.gate_up_gradient(d_hidden, x, d_gate_up, accumulate=False)
        stages.down_gradient(d_out, scaled, d_down, accumulate=False)
        by_row = [t[:routed] for t in (hidden_rows, act, y, d_hidden, scaled, rows)]
        return [*by_row, stages.combine(y, weights), d_weights, d_gate_up, d_down]

    return run


@pytest.fixture(scope="module")
def known():
    return {}


@pytest.fixture
def truth(block, known, poisoned):
    """What the smallest tiles compute, interpreted once: `block` always has the same values."""
    if not known:
        known["truth"] = block(SMALL)
    return known["truth"]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize(
    "sizes", [(16, 16, 16), (32, 16, 32), (16, 32, 16), (64, 64, 64), (16, 128, 16)]
)
def test_every_cut_gives_the_same_result(block, truth, sizes, tma):
    m, n, k = sizes
    tiles = Tiles(m, n, k, 4, 1, tma=tma, epilogue_n=16)
    for got, expected in zip(block(tiles), truth, strict=True):
        assert_close(got, expected, rms=1e-6)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("programs", "changes"), [(3, {}), (200, {"tma": True, "warp_specialize": True})]
)
def test_a_persistent_grid_gives_the_same_bits(block, monkeypatch, programs, changes):
    """Three programs walk over the tiles; of 200 most have none."""
    cut = Tiles(32, 32, 16, 4, 1, persistent=True, epilogue_n=16, **changes)
    plain = block(replace(cut, persistent=False, warp_specialize=False))
    for module in ("up", "product", "activation_gradient"):
        name = f"monkey_patch.kernels.scatter_moe.triton.{module}.grid_of"
        monkeypatch.setattr(name, lambda tiles, num_tiles, tensor: programs)
    *results, d_gate_up, d_down = block(cut)
    for got, expected in zip(results, plain, strict=False):
        assert torch.equal(got, expected)
    for got, expected in zip((d_gate_up, d_down), plain[-2:], strict=True):
        assert_close(got, expected, rms=1e-6)  # their walk adds rows in other steps


@pytest.mark.parametrize("persistent", [False, True])
def test_rows_of_no_expert_stay_untouched(monkeypatch, persistent):
    """The walk ends at the last tile there is, which only the device knows; here there is none."""
    index = torch.full((40, 2), 4)
    routing = TritonStages.sort_by_expert(index, 4)
    out = torch.full((80, 32), 7.0)
    cut = replace(SMALL, persistent=persistent)
    tiles = RowTiles(routing).map(cut.block_m)
    assert tiles.shape[1] > 0
    weight = torch.randn(4, 32, 48)
    product_launch(torch.randn(80, 48), weight, out, tiles, cut, transposed=True).run()
    assert (out == 7.0).all()


def test_warps_of_their_own_need_a_persistent_grid():
    with pytest.raises(ValueError, match="warp_specialize is true, but persistent is not"):
        replace(SMALL, warp_specialize=True)


def test_act_is_that_of_the_stored_hidden():
    """The backward pass sees the rounded hidden only; so does the forward pass."""
    index = torch.zeros(40, 1, dtype=torch.int64)
    x, gate_up = torch.randn(40, 32).bfloat16(), torch.randn(1, 64, 32).bfloat16()
    stages = TritonStages(TritonStages.sort_by_expert(index, 1), 1)
    hidden, act = stages.up(x, gate_up, hidden=True, act=True)
    gate, up = hidden.double().chunk(2, dim=-1)
    truth = torch.nn.functional.silu(gate) * up
    assert ((act.double() - truth).abs() <= truth.abs() * 2**-8).all()  # one rounding, no more


@pytest.mark.usefixtures("poisoned")
def test_a_library_product_gives_the_same(block, truth):
    for got, expected in zip(block(replace(SMALL, library=True)), truth, strict=True):
        assert_close(got, expected, rms=1e-6)


def far_rows(width, dtype=torch.float16):
    """A matrix with rows beyond 2**31 elements; pages that nobody touches cost nothing."""
    rows = 2**31 // width + 64
    return torch.empty(rows, width, dtype=dtype), rows - 32


def test_rows_beyond_two_billion_elements_are_read():
    width = 2048
    rows_ND, far = far_rows(width)
    rows_ND[far : far + 4] = torch.randn(4, width).half()
    out = torch.empty(2, width, dtype=torch.float16)
    slots = torch.tensor([far, far + 1, far + 2, far + 3], dtype=torch.int32)
    combine_launch(rows_ND, None, slots, out, 2).run()
    assert_close(out, rows_ND[far : far + 4].double().view(2, 2, width).sum(dim=1))


def test_rows_beyond_two_billion_elements_are_written():
    width, depth = 2048, 16
    out_NM, far = far_rows(width)
    rows_NK = torch.empty(len(out_NM), depth, dtype=torch.float16)
    rows_NK[far : far + 16] = torch.randn(16, depth).half()
    weight = torch.randn(1, width, depth).half()
    tiles = torch.tensor([[0], [far], [far + 16], [1]], dtype=torch.int32)
    cut = replace(SMALL, block_n=1024)
    for transposed, w in ((True, weight), (False, weight.transpose(1, 2).contiguous())):
        out_NM[far : far + 16] = torch.nan
        product_launch(rows_NK, w, out_NM, tiles, cut, transposed=transposed).run()
        assert_close(
            out_NM[far : far + 16], rows_NK[far : far + 16].double() @ weight[0].double().T
        )


def test_tokens_beyond_two_billion_elements_are_gathered():
    depth = 2048
    x_TD, far = far_rows(depth)
    x_TD[far] = torch.randn(depth).half()
    weight = torch.randn(1, 2 * 16, depth).half() / 45
    hidden = torch.empty(1, 32, dtype=torch.float16)
    tiles = torch.tensor([[0], [0], [1], [1]], dtype=torch.int32)
    slot = torch.tensor([far], dtype=torch.int32)
    up_launch(x_TD, weight, hidden, None, slot, tiles, 1, replace(SMALL, block_k=256)).run()
    assert_close(hidden, x_TD[far : far + 1].double() @ weight[0].double().T)


def test_gradients_of_rows_beyond_two_billion_elements():
    width, depth, rows = 1024, 16, 16
    hidden_N2F, far = far_rows(2 * width)
    d_hidden_N2F, _ = far_rows(2 * width)
    hidden_N2F[far : far + rows] = torch.randn(rows, 2 * width).half()
    d_out = torch.randn(rows, depth).half()
    down = torch.randn(1, depth, width).half() / 4
    num_slots = len(hidden_N2F)
    slots = torch.zeros(num_slots, dtype=torch.int32)
    slots[far : far + rows] = torch.arange(rows, dtype=torch.int32)
    tiles = torch.tensor([[0], [far], [far + rows], [1]], dtype=torch.int32)
    partial = torch.zeros(2, num_slots)
    cut = replace(SMALL, block_n=512)
    ones = torch.ones(rows, 1).half()
    activation_gradient_launch(
        d_out, down, hidden_N2F, ones, d_hidden_N2F, None, partial, slots, tiles, cut
    ).run()
    gate, up = hidden_N2F[far : far + rows].double().requires_grad_().chunk(2, dim=-1)
    act = torch.nn.functional.silu(gate) * up
    d_act = d_out.double() @ down[0].double()
    d_gate, d_up = torch.autograd.grad(act, (gate, up), d_act)
    assert_close(d_hidden_N2F[far : far + rows], torch.cat([d_gate, d_up], dim=-1))
    assert_close(partial.sum(dim=0)[far : far + rows], (d_act * act).sum(dim=-1), rms=1e-3)

    offsets = torch.tensor([far, far + rows], dtype=torch.int32)
    d_weight = torch.empty(1, 2 * width, depth)
    weight_gradient_launch(
        d_hidden_N2F, d_out, d_weight, slots, offsets, 1, replace(SMALL, block_m=512),
        gather_left=False, accumulate=False,
    ).run()  # fmt: skip
    assert_close(d_weight[0], d_hidden_N2F[far : far + rows].double().T @ d_out.double())


def test_the_sort_launches_only_what_it_needs():
    index = torch.zeros(4, 2, dtype=torch.int64)
    routing = Routing(*(torch.empty(n, dtype=torch.int32) for n in (129, 8, 8)))
    names = [launch.name for launch in kernels.sort_launches(index, 128, routing)]
    assert names == ["count_kernel", "scan_kernel", "place_kernel"]

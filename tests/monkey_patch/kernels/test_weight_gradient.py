"""The weight gradients against sums over rows in float64: both kernels, both sides, every grid."""

from dataclasses import replace

import pytest
import torch

from monkey_patch.kernels.scatter_moe.plain import PlainStages
from monkey_patch.kernels.scatter_moe.triton import weight_gradient
from monkey_patch.kernels.scatter_moe.triton.tiles import Tiles
from monkey_patch.kernels.scatter_moe.triton.weight_gradient import weight_gradient_launch
from tests.support.interpreter import use_kernels
from tests.support.oracle import assert_close

pytestmark = pytest.mark.kernel
CUT = Tiles(32, 16, 16, num_warps=4, num_stages=1, persistent=True, epilogue_n=16)


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    use_kernels(monkeypatch)


@pytest.fixture
def grid(monkeypatch):
    """Set the number of programs of the launches that follow."""

    def choose(programs):
        def limited(tiles, num_tiles, tensor):
            return min(programs, num_tiles) if tiles.persistent else num_tiles

        monkeypatch.setattr(weight_gradient, "grid_of", limited)

    return choose


class Case:
    """A routing with idle experts and rows of no expert, and rows that are NaN where undefined."""

    def __init__(self, sizes, top_k, m, n, dtype=torch.float32):
        choices = [e for e, size in enumerate(sizes) for _ in range(size)]
        slots = -(-(len(choices) + 1) // top_k) * top_k  # at least one is no expert's
        index = torch.tensor([*choices, *[len(sizes)] * (slots - len(choices))])
        index = index[torch.randperm(slots)].view(-1, top_k)
        self.top_k, self.routing = top_k, PlainStages.sort_by_expert(index, len(sizes))
        self.routed, self.num_experts = len(choices), len(sizes)
        self.tokens = {True: torch.randn(len(index), m), False: torch.randn(len(index), n)}
        self.rows = {True: torch.randn(slots, n), False: torch.randn(slots, m)}
        for rows in self.rows.values():
            rows[self.routed :] = torch.nan
        self.tokens = {side: t.to(dtype) for side, t in self.tokens.items()}
        self.rows = {side: t.to(dtype) for side, t in self.rows.items()}
        self.shape = (len(sizes), m, n)

    def run(self, cut, *, gather_left, out=None):
        """Return the gradient; `out` is added to."""
        token, rows = self.tokens[gather_left], self.rows[gather_left]
        left, right = (token, rows) if gather_left else (rows, token)
        found = torch.full(self.shape, torch.nan, dtype=left.dtype) if out is None else out
        weight_gradient_launch(
            left, right, found, self.routing.slot_of_row, self.routing.offsets, self.top_k, cut,
            gather_left=gather_left, accumulate=out is not None,
        ).run()  # fmt: skip
        return found

    def truth(self, *, gather_left):
        """Return the sums over the rows of each expert, one after the other, in float64."""
        total = torch.zeros(self.shape, dtype=torch.float64)
        offsets = self.routing.offsets.tolist()
        for expert in range(self.num_experts):
            for row in range(offsets[expert], offsets[expert + 1]):
                token = int(self.routing.slot_of_row[row]) // self.top_k
                sides = self.tokens[gather_left][token], self.rows[gather_left][row]
                left, right = sides if gather_left else sides[::-1]
                total[expert] += torch.outer(left.double(), right.double())
        return total


# Rows per expert beside a step of 16; (M, N) inside, at and past the borders of tiles of 32 x 16.
SIZES = {
    "few": ([3, 0, 1, 15], 2, 48, 16),
    "steps": ([16, 33, 0, 31], 1, 32, 24),
    "idle": ([0, 0, 0, 0], 3, 32, 16),
    "one": ([70], 10, 40, 8),
    "uneven": ([0, 100, 0, 5], 8, 32, 8),
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("gather_left", [False, True])
def test_every_grid_gives_the_sum_over_the_rows(sizes, tma, gather_left, grid):
    case, cut = Case(*sizes), replace(CUT, tma=tma)
    truth = case.truth(gather_left=gather_left)
    assert_close(case.run(replace(cut, persistent=False), gather_left=gather_left), truth)
    found = []
    # Three programs have several tiles each, a thousand at most one.
    for programs in (3, 1000):
        grid(programs)
        found.append(case.run(cut, gather_left=gather_left))
    assert_close(found[0], truth)
    assert torch.equal(*found), "a tile is summed in one order, whosever it is"


@pytest.mark.parametrize("cut", [CUT, replace(CUT, persistent=False), replace(CUT, epilogue_n=8)])
@pytest.mark.parametrize("gather_left", [False, True])
def test_bfloat16_rows_are_added_to_float32_gradients(cut, gather_left, grid):
    grid(3)
    case = Case([20, 0, 5], 2, 48, 40, dtype=torch.bfloat16)
    truth, before = case.truth(gather_left=gather_left), torch.randn(case.shape)
    found = case.run(replace(cut, tma=True), gather_left=gather_left, out=before.clone())
    assert_close(found, before.double() + truth)
    assert torch.equal(found[1], before[1]), "an idle expert's gradient stays"


@pytest.mark.parametrize("experts", [160, pytest.param(512, marks=pytest.mark.long)])
def test_many_experts_and_few_rows(experts, grid):
    """The numbers of Qwen3-Coder-480B and Qwen3-Next, on fewer programs than experts."""
    grid(5)
    case = Case([0, 2, 0, 1] * (experts // 4), 10, 16, 16)
    assert_close(case.run(replace(CUT, tma=True), gather_left=True), case.truth(gather_left=True))

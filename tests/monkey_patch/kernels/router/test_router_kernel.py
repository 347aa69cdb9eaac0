"""What the fused router computes, in the interpreter, against plain torch in float64."""

import pytest
import torch
import triton
import triton.language as tl

from monkey_patch.kernels.router.op import Balance, route, routed_counts, routing_sums
from monkey_patch.kernels.router.reference import route_reference
from monkey_patch.kernels.router.triton import forward
from tests.monkey_patch.kernels.router.router_inputs import (
    COEFFICIENT,
    GLOBAL_TOKENS,
    direction_of,
    make_balance,
    random_logits,
    run,
    truth_of,
)
from tests.support.interpreter import use_kernels
from tests.support.oracle import assert_close

pytestmark = pytest.mark.kernel


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    use_kernels(monkeypatch)


def assert_statistics(routed, index, probs, balance):
    counts = routed_counts(index, balance.mask, balance.num_rows, probs.shape[1])
    assert torch.equal(routed.counts, counts)
    assert routed.sums.dtype == torch.float64
    assert_close(routed.sums, routing_sums(probs.detach(), balance.mask, counts), rms=1e-6)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("tokens", "num_rows", "experts", "top_k", "masked"),
    [
        (66, 2, 128, 8, True),
        (33, 1, 128, 8, False),
        (21, 3, 60, 4, True),
        (9, 1, 512, 10, True),
        (300, 1, 8, 2, True),
        (15, 5, 6, 6, False),
        (7, 1, 5, 1, True),
        (4, 2, 1, 1, True),
    ],
)
def test_agrees_with_the_definition(tokens, num_rows, experts, top_k, masked, dtype, renormalize):
    logits = random_logits(tokens, experts, dtype)
    balance = make_balance(logits, num_rows, masked)
    routed, gradient = run(logits, top_k, renormalize, balance)
    weights, index, probs, expected = truth_of(logits, top_k, renormalize, balance)
    assert torch.equal(routed.index, index)
    assert routed.weights.dtype == gradient.dtype == dtype
    assert_close(routed.weights, weights, name="weights")
    assert_close(gradient, expected, name="d_logits")
    assert_statistics(routed, index, probs, balance)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("renormalize", [True, False])
def test_without_a_balance_it_only_routes(renormalize):
    logits = random_logits(50, 20)
    routed, gradient = run(logits, 3, renormalize)
    weights, index, _, expected = truth_of(logits, 3, renormalize)
    assert torch.equal(routed.index, index)
    assert_close(routed.weights, weights)
    assert_close(gradient, expected)
    assert routed.counts is None
    assert routed.sums is None


def test_the_balance_term_is_not_negligible():
    logits = random_logits(66, 128)
    balance = make_balance(logits, 2)
    with_it, without = (truth_of(logits, 8, True, b)[3] for b in (balance, None))
    assert (with_it - without).norm() > 0.1 * without.norm()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("tokens", [66, 64, 2 * 161])
def test_a_program_may_take_several_blocks(monkeypatch, tokens):
    """As it does in long rows: at E = 128 more than 8,192 tokens."""
    monkeypatch.setattr(forward, "_MOST_LINES", 2)
    monkeypatch.setattr(forward, "_TILE", 16 * 8)
    logits = random_logits(tokens, 8)
    balance = make_balance(logits, 2)
    routed, _ = run(logits, 2, True, balance)
    weights, index, probs, _ = truth_of(logits, 2, True)
    assert torch.equal(routed.index, index)
    assert_close(routed.weights, weights)
    assert_statistics(routed, index, probs, balance)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("num_rows", [1, 3])
def test_no_tokens(num_rows):
    logits = random_logits(0, 16)
    balance = make_balance(logits, num_rows)
    routed, gradient = run(logits, 4, True, balance)
    assert routed.weights.shape == routed.index.shape == (0, 4)
    assert gradient.shape == (0, 16)
    assert torch.equal(routed.counts, torch.zeros(num_rows, 16, dtype=torch.int64))
    assert routed.sums.tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_go_to_the_lowest_index(dtype):
    logits = torch.randint(0, 3, (40, 24)).to(dtype)
    logits[:8] = 0
    logits[0, ::2] = -0.0
    routed = route(logits, 10, renormalize=True)
    assert torch.equal(routed.index, route_reference(logits.double(), 10, renormalize=True)[1])
    assert routed.index[:8].tolist() == [list(range(10))] * 8


@pytest.mark.parametrize("bits", [0x7FC00000, -0x400000, -1, 0x7FFFFFFF], ids=hex)
def test_any_nan_is_chosen_within_the_experts(bits):
    """A kernel around the choice alone: what arithmetic makes of a NaN differs between devices."""
    choose = forward._choose

    @triton.jit
    def kernel(probs_ptr, index_ptr, choose: tl.constexpr):
        tokens, columns = tl.arange(0, 1)[:, None], tl.arange(0, 8)[None, :]
        _, index, _ = choose(tl.load(probs_ptr + tokens + columns), 8, 4, 4)
        tl.store(index_ptr + tokens + tl.arange(0, 4)[None, :], index)

    probs = torch.full((1, 8), bits, dtype=torch.int32).view(torch.float32)
    probs[:, 5:] = 0
    index = torch.full((1, 4), -1, dtype=torch.int32)
    kernel[(1,)](probs, index, choose)
    assert index.tolist() == [[0, 1, 2, 3]]


def test_large_logits_do_not_overflow():
    logits = random_logits(20, 12) + torch.randint(-5, 6, (20, 1)) * 1000
    weights, index, _, expected = truth_of(logits, 3, False)
    routed, gradient = run(logits, 3, False)
    assert torch.equal(routed.index, index)
    assert_close(routed.weights, weights)
    assert_close(gradient, expected)


def test_what_all_choices_have_in_common_cancels():
    logits = random_logits(40, 32)
    gradients = []
    for function, leaf in ((route, logits.clone()), (route_reference, logits.double())):
        weights, *_ = function(leaf.requires_grad_(), 4, renormalize=True)
        weights.backward(1024 + direction_of(weights))
        gradients.append(leaf.grad)
    assert_close(*gradients)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, of inf - inf
@pytest.mark.usefixtures("poisoned")
def test_nan_and_inf_stay_within_their_token():
    nan, inf = float("nan"), float("inf")
    logits = random_logits(12, 6)
    logits[0, 2], logits[1], logits[2, 5] = nan, nan, -nan
    logits[3], logits[4, 1], logits[5, :5] = -inf, inf, -inf
    bad = torch.arange(12) < 5
    balance = Balance(~bad, 1, torch.tensor(COEFFICIENT * 6 / GLOBAL_TOKENS))
    routed, gradient = run(logits, 4, True, balance)
    assert ((routed.index >= 0) & (routed.index < 6)).all()
    assert all(len(set(chosen)) == 4 for chosen in routed.index.tolist())
    assert routed.weights[bad].isnan().all()
    assert gradient[bad].isnan().all()

    clean = torch.where(bad[:, None], 0.0, logits)
    weights, index, probs, expected = truth_of(clean, 4, True, balance)
    assert torch.equal(routed.index[~bad], index[~bad])
    assert_close(routed.weights[~bad], weights[~bad])
    assert_close(gradient[~bad], expected[~bad])
    assert_statistics(routed, index, probs, balance)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_further_from_float64_than_plain_torch(monkeypatch, dtype, renormalize):
    """With a gradient that is almost the same for all choices, so that most of it cancels."""
    logits = (torch.rand(200, 32).argsort(dim=1) / 4).to(dtype)  # no ties

    def gradient(function, leaf):
        weights, *_ = function(leaf.requires_grad_(), 4, renormalize=renormalize)
        weights.backward(4 + direction_of(weights) / 64)
        return leaf.grad

    truth = gradient(route_reference, logits.double())
    fused = gradient(route, logits.clone())
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    plain = gradient(route, logits.clone())
    assert (fused - truth).norm() <= 2 * (plain - truth).norm()


@pytest.mark.parametrize("renormalize", [True, False])
def test_gradient_is_exact_where_weights_are_zero(renormalize):
    """Probabilities that underflow are chosen too once K exceeds the others."""
    logits = random_logits(16, 8)
    logits[:, 3:] -= 300
    balance = make_balance(logits, 1)
    routed, gradient = run(logits, 5, renormalize, balance)
    assert (routed.weights[:, 3:] == 0).all()
    *_, expected = truth_of(logits, 5, renormalize, balance)
    assert_close(gradient, expected)


@pytest.mark.usefixtures("poisoned")
def test_strides_do_not_matter():
    wide = random_logits(40, 48)
    balance = make_balance(wide[:, ::3], 2)
    for strided in (wide[:, ::3], wide[:, :16].T.contiguous().T):
        expected, gradient = run(strided.contiguous(), 4, True, balance)
        leaf = strided.detach().requires_grad_()
        routed = route(leaf, 4, renormalize=True, balance=balance)
        direction = direction_of(routed.weights).T.contiguous().T
        routed.weights.backward(direction)
        for a, b in zip((*routed, leaf.grad), (*expected, gradient), strict=True):
            assert torch.equal(a, b)


def test_every_run_gives_the_same_bits():
    logits = random_logits(70, 128, torch.bfloat16)
    balance = make_balance(logits, 2)
    (first, first_gradient), (second, second_gradient) = (
        run(logits, 8, True, balance) for _ in range(2)
    )
    for a, b in zip((*first, first_gradient), (*second, second_gradient), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("shape", "top_k", "balance", "message"),
    [
        ((4, 8), 9, None, r"top_k is 9; expected \(T, E\) with 1 <= top_k <= E"),
        ((4, 8), 0, None, r"top_k is 0"),
        ((2, 4, 8), 2, None, r"logits have shape \(2, 4, 8\)"),
        ((4, 8), 2, Balance(None, 3, torch.ones(())), "4 tokens cannot be 3 equally long rows"),
        ((4, 8), 2, Balance(None, 0, torch.ones(())), "0 equally long rows"),
        ((4, 8), 2, Balance(torch.ones(3) > 0, 1, torch.ones(())), r"shape \(3,\), .* bool \(4,\)"),
        ((4, 8), 2, Balance(torch.ones(4), 1, torch.ones(())), r"torch.float32 .* bool \(4,\)"),
    ],
)
def test_refusals(shape, top_k, balance, message):
    with pytest.raises(ValueError, match=message):
        route(torch.randn(shape), top_k, renormalize=True, balance=balance)

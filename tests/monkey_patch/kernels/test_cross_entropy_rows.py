"""Linear cross entropy on its kernel, in the interpreter, against the definition in float64."""

import pytest
import torch
import torch.nn.functional as F
from triton.runtime import interpreter

from monkey_patch.kernels.launch import Launch
from monkey_patch.kernels.linear_cross_entropy import linear_cross_entropy_sum, op
from monkey_patch.kernels.linear_cross_entropy.reference import linear_cross_entropy_sum_reference
from monkey_patch.kernels.linear_cross_entropy.triton import rows
from tests.support.interpreter import use_kernels
from tests.support.oracle import RMS_TOLERANCE, assert_close

pytestmark = pytest.mark.kernel
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INF, NAN = float("inf"), float("nan")


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    use_kernels(monkeypatch)
    monkeypatch.setattr(rows, "_BLOCK_V", 64)


@pytest.fixture
def wider_product():
    """The sum in float32 inside a product of halves, which torch has for CUDA alone."""

    def product(total, a, b, out_dtype, *, beta=1, alpha=1, out):
        assert out_dtype == total.dtype == out.dtype == torch.float32
        before = beta * total if beta else 0
        return out.copy_(before + alpha * (a.float() @ b.float()))

    library = torch.library.Library("aten", "IMPL")
    library.impl("addmm.dtype_out", product, "CPU")
    yield
    library._destroy()


def make(N, V, D=24, dtype=torch.float32):
    hidden, weight = torch.randn(N, D).to(dtype), torch.randn(V, D).to(dtype)
    return hidden, weight, torch.randint(0, V, (N,))


def run(function, hidden, weight, targets, dtype=None, **options):
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (hidden, weight)]
    loss = function(*leaves, targets, **options)
    (loss * 0.3).backward()
    return [loss, *(leaf.grad for leaf in leaves)]


def rows_of(logits, targets, *, gradient=True):
    """Return losses and what then stands in the place of the logits."""
    logits = logits.clone()
    losses = torch.full((len(logits),), NAN)
    rows.cross_entropy_rows_launch(logits, targets, losses, gradient=gradient).run()
    return losses, logits


def truth_of(logits, targets):
    leaf = logits.double().requires_grad_()
    losses = F.cross_entropy(leaf, targets, reduction="none")
    losses.sum().backward()
    return losses, leaf.grad


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("N", "V", "chunk_tokens"),
    [(37, 150, 8), (16, 64, 16), (1, 65, None), (5, 3, 2), (9, 257, None), (3, 1, 2)],
)
def test_loss_and_gradients_match_the_definition(dtype, N, V, chunk_tokens):
    inputs = make(N, V, dtype=dtype)
    truth = run(linear_cross_entropy_sum_reference, *inputs, dtype=torch.float64)
    got = run(linear_cross_entropy_sum, *inputs, chunk_tokens=chunk_tokens)
    assert got[0].dtype == torch.float32
    for name, a, e in zip(("loss", "hidden", "weight"), got, truth, strict=True):
        if V > 1 or name == "loss":  # of one word, all is 0
            assert_close(a, e, name=name, rms=RMS_TOLERANCE[dtype])
        else:
            assert a.abs().max() == 0


def test_it_is_the_kernel_that_computes(monkeypatch):
    launched = []
    monkeypatch.setattr(Launch, "run", lambda self: launched.append(self.grid))
    linear_cross_entropy_sum(*make(10, 20), chunk_tokens=4)
    assert launched == [4, 4, 2]


@pytest.mark.usefixtures("poisoned")
def test_no_labelled_position_still_reaches_every_parameter():
    loss, d_hidden, d_weight = run(linear_cross_entropy_sum, *make(0, 50))
    assert loss == 0
    assert d_hidden.shape == (0, 24)
    assert torch.equal(d_weight, torch.zeros(50, 24))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shift", [0.0, 3e4, -3e4])
def test_extreme_logits_and_targets_at_the_edges(dtype, shift):
    logits = torch.randn(8, 150) * 100 + shift
    logits[0, 3], logits[1, 149], logits[2, :] = 6e4, -6e4, 0.0
    logits[3, 70:], logits[4, :149] = -INF, -INF
    logits = logits.to(dtype)
    targets = torch.tensor([3, 149, 0, 63, 149, 64, 127, 128])
    losses, gradient = rows_of(logits, targets)
    expected, expected_gradient = truth_of(logits, targets)
    assert_close(losses, expected, rms=1e-6)
    assert_close(gradient, expected_gradient)
    kept_losses, kept = rows_of(logits, targets, gradient=False)
    assert torch.equal(kept_losses, losses)
    assert torch.equal(kept, logits)


def test_a_target_without_probability_costs_infinity():
    logits = torch.zeros(2, 70)
    logits[0, 66] = -INF
    losses, gradient = rows_of(logits, torch.tensor([66, 66]))
    assert losses[0] == INF
    assert torch.isfinite(losses[1])
    assert gradient[0, 66] == -1


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, of inf - inf
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
def test_what_is_not_finite_stays_in_its_row():
    logits = torch.randn(6, 100)
    clean, targets = logits.clone(), torch.tensor([5, 5, 5, 100, -1, 5])
    logits[0, 70], logits[1, 3], logits[2] = NAN, INF, -INF
    losses, gradient = rows_of(logits, targets)
    assert losses[:5].isnan().all(), "targets outside of [0, V) too"
    assert gradient[:5].isnan().any(dim=1).all()
    expected, expected_gradient = truth_of(clean[5:], targets[5:])
    assert_close(losses[5:], expected)
    assert_close(gradient[5:], expected_gradient)


def test_every_run_gives_the_same_bits():
    inputs = make(33, 130, dtype=torch.bfloat16)
    first, second = (run(linear_cross_entropy_sum, *inputs, chunk_tokens=8) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_gradient_is_no_further_from_float64_than_plain_torch(monkeypatch):
    inputs = make(64, 300, dtype=torch.bfloat16)
    truth = run(linear_cross_entropy_sum_reference, *inputs, dtype=torch.float64)
    fused = run(linear_cross_entropy_sum, *inputs, chunk_tokens=16)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    plain = run(linear_cross_entropy_sum, *inputs, chunk_tokens=16)
    for a, b, e in zip(fused, plain, truth, strict=True):
        assert (a - e).norm() <= 1.05 * (b - e).norm() + 1e-6 * e.norm()


@pytest.mark.usefixtures("wider_product")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_are_summed_in_float32_inside_the_product(dtype):
    """The branch of CUDA, with torch's own arguments; the sum of chunks is exact in float32."""
    parts = [(torch.randn(8, 20).to(dtype), torch.randn(8, 12).to(dtype)) for _ in range(3)]
    total = torch.full((20, 12), NAN)
    for index, (d_logits, hidden) in enumerate(parts):
        op._add_wider_product(total, d_logits, hidden, index == 0)
    expected = sum(a.double().T @ b.double() for a, b in parts)
    assert_close(total, expected, rms=1e-6)


def test_without_gradients_the_logits_are_not_written_over():
    inputs = make(20, 90)
    with torch.no_grad():
        loss = linear_cross_entropy_sum(*inputs, chunk_tokens=8)
    assert_close(
        loss, linear_cross_entropy_sum_reference(*(t.double() for t in inputs[:2]), inputs[2])
    )
    assert not loss.requires_grad


def test_autocast_runs_in_its_dtype_with_full_precision_gradients():
    inputs = make(37, 150)
    truth = run(linear_cross_entropy_sum_reference, *inputs, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(linear_cross_entropy_sum, *inputs, chunk_tokens=8)
    for name, a, e in zip(("loss", "hidden", "weight"), got, truth, strict=True):
        assert a.dtype == torch.float32
        assert_close(a, e, name=name, rms=RMS_TOLERANCE[torch.bfloat16])


def test_compiles_to_one_graph():
    inputs = make(20, 90)
    compiled = torch.compile(linear_cross_entropy_sum, backend="aot_eager", fullgraph=True)
    got, expected = (run(f, *inputs, chunk_tokens=8) for f in (compiled, linear_cross_entropy_sum))
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("gradient", [True, False])
def test_bytes_of_the_kernel(monkeypatch, gradient):
    """Counted by the interpreter: two reads and a write, and next to nothing beside them."""
    moved = {"load": 0, "store": 0}
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def counted_load(self, pointers, mask, *others):
        out = load(self, pointers, mask, *others)
        moved["load"] += int(mask.data.sum()) * out.data.itemsize
        return out

    def counted_store(self, pointers, value, mask, *others):
        moved["store"] += int(mask.data.sum()) * value.data.itemsize
        return store(self, pointers, value, mask, *others)

    monkeypatch.setattr(builder, "create_masked_load", counted_load)
    monkeypatch.setattr(builder, "create_masked_store", counted_store)
    logits = torch.randn(4, 1000)
    rows_of(logits, torch.zeros(4, dtype=torch.int64), gradient=gradient)
    reads, writes = (rows.READS, rows.WRITES) if gradient else (1, 0)
    assert reads * logits.nbytes <= moved["load"] <= reads * logits.nbytes + 4 * 16
    assert writes * logits.nbytes <= moved["store"] <= writes * logits.nbytes + 4 * 16

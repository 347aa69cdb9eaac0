"""The op as a citizen of torch: compile, checkpointing, what it keeps, who owns the gradients."""

import gc
import weakref
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from monkey_patch.kernels.scatter_moe import scatter_moe
from monkey_patch.kernels.scatter_moe.reference import scatter_moe_reference
from tests.monkey_patch.kernels.experts import NAMES, make_inputs, run_with_gradients
from tests.support.oracle import assert_close

OP = torch.ops.monkey_patch.scatter_moe.default


class Saved:
    """Everything that autograd keeps while the block is entered."""

    def __enter__(self):
        self.tensors = []
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda t: t)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error):
        self._hooks.__exit__(*error)

    def _keep(self, tensor):
        self.tensors.append(tensor)
        return tensor

    def bytes_beside(self, *known):
        storages = {t.untyped_storage().data_ptr() for t in known}
        other = [t for t in self.tensors if t.untyped_storage().data_ptr() not in storages]
        return sum(t.untyped_storage().nbytes() for t in other)


@pytest.mark.parametrize(("recompute", "limit"), [(False, 24.7e3), (True, 130)])
def test_bytes_kept_per_token_at_the_sizes_of_qwen3_30b(recompute, limit):
    tokens = 64
    (x, gate_up, down, weights), index = make_inputs(
        T=tokens, E=8, K=8, D=2048, F=768, dtype=torch.bfloat16
    )
    leaves = [t.requires_grad_() for t in (x, gate_up, down, weights)]
    with Saved() as saved:
        out = scatter_moe(x, gate_up, down, index, weights, recompute_hidden=recompute)
    assert out.requires_grad
    kept = saved.bytes_beside(x, gate_up, down)  # the routing weights count
    assert kept / tokens <= limit
    assert any(t is leaves[1] for t in saved.tensors)
    assert any(t is leaves[2] for t in saved.tensors)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_swapped_out_parameters_are_not_kept_alive(weight_dtype):
    """ZeRO-3 empties `param.data` after the forward pass and gathers it again before backward."""
    (x, gate_up, down, weights), index = make_inputs(dtype=weight_dtype)
    truth = run_with_gradients(
        scatter_moe_reference, (x, gate_up, down, weights), index, torch.float64
    )
    parameters = [torch.nn.Parameter(t.clone()) for t in (gate_up, down)]
    x = x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=weight_dtype == torch.float32):
        out = scatter_moe(x, *parameters, index, weights)
    storages = [weakref.ref(p.data.untyped_storage()) for p in parameters]
    for parameter in parameters:
        parameter.data = torch.empty(0, dtype=weight_dtype)
    gc.collect()
    assert [ref() for ref in storages] == [None, None]
    for parameter, full in zip(parameters, (gate_up, down), strict=True):
        parameter.data = full.clone()
    out.backward(torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype))
    for actual, expected in zip((x, *parameters), truth[1:4], strict=True):
        assert_close(actual.grad, expected, rms=2e-2)
    assert parameters[0].grad.dtype == weight_dtype


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputed_hidden_gives_the_same_bits(dtype):
    inputs = make_inputs(dtype=dtype)
    kept = run_with_gradients(scatter_moe, *inputs)
    again = run_with_gradients(partial(scatter_moe, recompute_hidden=True), *inputs)
    for name, a, b in zip(("out", *NAMES), kept, again, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_added_in_place(dtype):
    (x, gate_up, down, weights), index = make_inputs(dtype=dtype)
    run = partial(scatter_moe, accumulate_gradients=True)
    truth = run_with_gradients(
        scatter_moe_reference, (x, gate_up, down, weights), index, torch.float64
    )
    gate_up, down = (torch.nn.Parameter(t) for t in (gate_up, down))
    direction = torch.linspace(-1, 1, x.numel()).view(x.shape).to(dtype)
    for count in (1, 2, 3):
        before = [p.grad for p in (gate_up, down)]
        run(x, gate_up, down, index, weights).backward(direction)
        for parameter, expected, old in zip((gate_up, down), truth[2:4], before, strict=True):
            assert_close(parameter.grad, count * expected)
            assert old is None or parameter.grad is old


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("frozen", [(0,), (1, 2), (3,), (0, 1, 2), (1,), (2,)])
def test_frozen_arguments_get_no_gradient_and_change_no_other(frozen):
    tensors, index = make_inputs()
    expected = run_with_gradients(scatter_moe, tensors, index)[1:]
    leaves = [t.clone().requires_grad_(i not in frozen) for i, t in enumerate(tensors)]
    out = scatter_moe(*leaves[:3], index, leaves[3])
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).float())
    for i, (leaf, grad) in enumerate(zip(leaves, expected, strict=True)):
        if i in frozen:
            assert leaf.grad is None
        else:
            assert torch.equal(leaf.grad, grad)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_to_one_graph(dtype):
    tensors, index = make_inputs(dtype=dtype)
    compiled = torch.compile(scatter_moe, backend="aot_eager", fullgraph=True)
    for a, b in zip(
        run_with_gradients(compiled, tensors, index),
        run_with_gradients(scatter_moe, tensors, index),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_a_new_number_of_tokens_compiles_no_third_time():
    torch._dynamo.reset()
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(scatter_moe, backend=count, fullgraph=True)
    for tokens in (8, 24, 40, 56):
        (x, gate_up, down, weights), index = make_inputs(T=tokens)
        compiled(x, gate_up, down, index, weights)
    assert len(graphs) == 2  # one for the first size, one for all others


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("recompute", [False, True])
def test_shapes_dtypes_and_schema_are_what_torch_was_told(recompute):
    (x, gate_up, down, weights), index = make_inputs(T=5, K=2, dtype=torch.bfloat16)
    leaves = [t.requires_grad_() for t in (x, gate_up, down, weights)]
    arguments = (*leaves[:3], index, leaves[3], recompute, False)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(OP, arguments, test_utils=checks)


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts how often the op runs."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is OP
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("is_saved", "runs"), [(True, 1), (False, 2)])
def test_selective_checkpointing_can_name_the_op(is_saved, runs):
    tensors, index = make_inputs()
    saved = CheckpointPolicy.MUST_SAVE if is_saved else CheckpointPolicy.MUST_RECOMPUTE

    def policy(ctx, op, *args, **kwargs):
        return saved if op is OP else CheckpointPolicy.MUST_RECOMPUTE

    def run(*arguments):
        return checkpoint(
            scatter_moe, *arguments, use_reentrant=False,
            context_fn=partial(create_selective_checkpoint_contexts, policy),
        )  # fmt: skip

    with Calls() as calls:
        got = run_with_gradients(run, tensors, index)
    assert calls.count == runs
    for a, b in zip(got, run_with_gradients(scatter_moe, tensors, index), strict=True):
        assert torch.equal(a, b)


def test_a_second_derivative_is_refused():
    tensors, index = make_inputs(T=4)
    x, gate_up, down, weights = (t.requires_grad_() for t in tensors)
    out = scatter_moe(x, gate_up, down, index, weights)
    (d_x,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="scatter_moe_backward"):
        d_x.sum().backward()

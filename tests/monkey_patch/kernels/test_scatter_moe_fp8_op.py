"""The op in FP8 as a citizen of torch: autocast, accumulation, compile, checkpointing, refusals."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from monkey_patch.kernels.fp8_device import require_fp8_products
from monkey_patch.kernels.scatter_moe import scatter_moe
from tests.monkey_patch.kernels.experts import NAMES, make_inputs, run_with_gradients
from tests.support.oracle import assert_close

OP = torch.ops.monkey_patch.scatter_moe.default
SCALINGS = ["blockwise", "rowwise", "mxfp8"]


@pytest.mark.parametrize("scaling", SCALINGS)
def test_float32_weights_under_autocast(scaling):
    tensors, index = make_inputs()
    narrow = [t.bfloat16() for t in tensors[:3]]
    run = partial(scatter_moe, fp8=scaling)
    truth = run_with_gradients(run, [*narrow, tensors[3]], index)
    # On the grid of bfloat16, so that both quantise the same values.
    wide = [t.float() for t in narrow]
    with torch.autocast("cpu", torch.bfloat16):
        got = run_with_gradients(run, [*wide, tensors[3]], index)
    for name, a, e in zip(("out", *NAMES), got, truth, strict=True):
        assert a.dtype == torch.float32
        assert_close(a, e, name=name, rms=2e-2)


def test_weights_are_quantised_from_their_own_dtype():
    """A little above the middle of 1 and 1.125; in bfloat16 the middle itself, which becomes 1."""
    gate_up = torch.tensor([448.0, 1.0625 + 2**-12]).expand(1, 2, 2).contiguous()
    x, index, one = torch.tensor([[0.0, 1.0]]), torch.zeros(1, 1).long(), torch.ones(1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        out = scatter_moe(x, gate_up, torch.ones(1, 2, 1), index, one, fp8="blockwise")
    hidden = torch.tensor(1.125)
    assert_close(out, (torch.nn.functional.silu(hidden) * hidden).expand(1, 2), rms=8e-3)


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_added_in_place(recompute):
    tensors, index = make_inputs(dtype=torch.bfloat16)
    run = partial(
        scatter_moe, fp8="blockwise", accumulate_gradients=True, recompute_hidden=recompute
    )
    expected = run_with_gradients(run, tensors, index)[2:4]
    x, gate_up, down, weights = tensors
    gate_up, down = (torch.nn.Parameter(t) for t in (gate_up, down))
    direction = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view(x.shape).bfloat16()
    for count in (1, 2):
        before = [p.grad for p in (gate_up, down)]
        run(x, gate_up, down, index, weights).backward(direction)
        for parameter, gradient, old in zip((gate_up, down), expected, before, strict=True):
            assert_close(parameter.grad, count * gradient)
            assert old is None or parameter.grad is old


@pytest.mark.parametrize("frozen", [(0,), (1, 2), (3,), (0, 1, 2)])
def test_frozen_arguments_get_no_gradient_and_change_no_other(frozen):
    tensors, index = make_inputs()
    run = partial(scatter_moe, fp8="blockwise", recompute_hidden=True)
    expected = run_with_gradients(run, tensors, index)[1:]
    leaves = [t.clone().requires_grad_(i not in frozen) for i, t in enumerate(tensors)]
    out = run(*leaves[:3], index, leaves[3])
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).float())
    for i, (leaf, gradient) in enumerate(zip(leaves, expected, strict=True)):
        assert leaf.grad is None if i in frozen else torch.equal(leaf.grad, gradient)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_compiles_to_one_graph(scaling):
    tensors, index = make_inputs(dtype=torch.bfloat16)
    run = partial(scatter_moe, fp8=scaling)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for a, b in zip(
        run_with_gradients(compiled, tensors, index),
        run_with_gradients(run, tensors, index),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("recompute", [False, True])
def test_shapes_dtypes_and_schema_are_what_torch_was_told(recompute):
    (x, gate_up, down, weights), index = make_inputs(T=5, K=2, dtype=torch.bfloat16)
    leaves = [t.requires_grad_() for t in (x, gate_up, down, weights)]
    arguments = (*leaves[:3], index, leaves[3], recompute, False, "blockwise")
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(OP, arguments, test_utils=checks)


@pytest.mark.parametrize(("is_saved", "runs"), [(True, 1), (False, 2)])
def test_selective_checkpointing_can_name_the_op(is_saved, runs):
    """It is the operator that it is without FP8."""
    tensors, index = make_inputs()
    count = 0

    def policy(context, op, *args, **kwargs):
        nonlocal count
        count += op is OP
        is_kept = is_saved and op is OP
        return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.MUST_RECOMPUTE

    executed = 0

    class Calls(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal executed
            executed += func is OP
            return func(*args, **(kwargs or {}))

    run = partial(scatter_moe, fp8="blockwise")
    checkpointed = partial(
        checkpoint, run, use_reentrant=False,
        context_fn=partial(create_selective_checkpoint_contexts, policy),
    )  # fmt: skip
    with Calls():
        got = run_with_gradients(checkpointed, tensors, index)
    assert executed == runs
    for a, b in zip(got, run_with_gradients(run, tensors, index), strict=True):
        assert torch.equal(a, b)


def test_nothing_quantised_is_kept_for_the_backward_pass():
    (x, gate_up, down, weights), index = make_inputs(dtype=torch.bfloat16)
    kept = []
    leaves = [t.requires_grad_() for t in (x, gate_up, down, weights)]

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        scatter_moe(*leaves[:3], index, leaves[3], fp8="blockwise", recompute_hidden=True)
    assert any(t is leaves[1] for t in kept)
    assert any(t is leaves[2] for t in kept)
    assert {t.dtype for t in kept} <= {torch.bfloat16, torch.int32}


def test_wrong_arguments_are_named():
    tensors, index = make_inputs()
    with pytest.raises(ValueError, match="fp8 is 'tensorwise', expected one of off, blockwise"):
        scatter_moe(*tensors[:3], index, tensors[3], fp8="tensorwise")
    wide = [t.double() for t in tensors]
    with pytest.raises(ValueError, match="float64: cast it or set fp8='off'"):
        scatter_moe(*wide[:3], index, wide[3], fp8="rowwise")


def test_a_gpu_without_fp8_is_refused():
    for scaling in SCALINGS[:2]:
        require_fp8_products((8, 9), "L40S", scaling)
        with pytest.raises(ValueError, match=r"A100 is .*capability 8\.0.*needs 8\.9 .*FP8 off"):
            require_fp8_products((8, 0), "A100", scaling)
    for capability in ((10, 0), (10, 3), (12, 0)):
        require_fp8_products(capability, "B200", "mxfp8")
    with pytest.raises(ValueError, match=r"H200 is .* 9\.0, its scales need 10\.0 .* blockwise"):
        require_fp8_products((9, 0), "H200", "mxfp8")
    with pytest.raises(ValueError, match=r"A100 is a device without FP8"):
        require_fp8_products((8, 0), "A100", "mxfp8")

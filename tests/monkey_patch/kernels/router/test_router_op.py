"""The fused router as a citizen of torch and of a patched model, in the interpreter."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from monkey_patch import apply_patches, router_statistics
from monkey_patch.kernels.router.op import route
from monkey_patch.kernels.router.triton import stages
from tests.monkey_patch.kernels.router.router_inputs import (
    direction_of,
    make_balance,
    random_logits,
    run,
)
from tests.support.interpreter import use_kernels
from tests.support.oracle import assert_close

pytestmark = pytest.mark.kernel

OP = torch.ops.monkey_patch.route.default
BACKWARD_OP = torch.ops.monkey_patch.route_backward.default


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    use_kernels(monkeypatch)


def test_only_weights_carry_a_gradient():
    logits = random_logits(10, 8).requires_grad_()
    balance = make_balance(logits, 1)
    routed = route(logits, 2, renormalize=True, balance=balance)
    assert [t.requires_grad for t in routed] == [True, False, False, False]
    frozen = route(logits.detach(), 2, renormalize=True, balance=balance)
    assert not frozen.weights.requires_grad


def test_backward_is_one_op():
    """No zeros for outputs that have no gradient."""

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            ops.append(function)
            return function(*args, **(kwargs or {}))

    ops = []
    logits = random_logits(10, 8).requires_grad_()
    routed = route(logits, 2, renormalize=True, balance=make_balance(logits, 1))
    direction = direction_of(routed.weights)
    with Seen():
        torch.autograd.grad(routed.weights, logits, direction)
    assert [op for op in ops if op.namespace == "monkey_patch"] == [BACKWARD_OP]
    assert not [op for op in ops if "zero" in op.name()]


def test_autograd_keeps_the_logits_and_no_other_token_by_expert_tensor():
    logits = random_logits(64, 32, torch.bfloat16).requires_grad_()
    balance = make_balance(logits, 2)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        routed = route(logits, 2, renormalize=True, balance=balance)
    others = [t for t in kept if t.data_ptr() != logits.data_ptr()]
    assert len(others) == len(kept) - 1
    # The index, the mask, the counts and the scale.
    assert sum(t.numel() for t in others) == routed.index.numel() + 64 + 2 * 32 + 1


@pytest.mark.parametrize("balanced", [True, False])
def test_op_keeps_the_rules_of_torch_library(balanced):
    logits = random_logits(12, 6).requires_grad_()
    balance = make_balance(logits, 2) if balanced else (None, 0, None)
    torch.library.opcheck(OP, (logits, 2, True, *balance))
    routed = route(logits.detach(), 2, renormalize=True)
    counts = torch.ones((2, 6) if balanced else (0, 6), dtype=torch.int64)
    arguments = (logits.detach(), routed.index, True, balance[0], counts, balance[2])
    torch.library.opcheck(BACKWARD_OP, (routed.weights, *arguments))


@pytest.mark.parametrize("balanced", [True, False])
def test_compiles_to_one_graph(balanced):
    logits = random_logits(30, 12, torch.bfloat16)
    balance = make_balance(logits, 2) if balanced else None
    compiled = torch.compile(route, backend="aot_eager", fullgraph=True)
    actual, expected = (run(logits, 3, True, balance, f) for f in (compiled, route))
    for a, b in zip((*actual[0], actual[1]), (*expected[0], expected[1]), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_a_new_number_of_tokens_compiles_no_third_time():
    torch._dynamo.reset()
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(route, backend=count, fullgraph=True)
    for tokens in (24, 36, 48):
        logits = random_logits(tokens, 12)
        compiled(logits, 3, renormalize=True, balance=make_balance(logits, 2))
    assert len(graphs) <= 2


@pytest.mark.parametrize("policy", [CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE])
def test_selective_checkpointing_replays_or_recomputes(monkeypatch, policy):
    calls, launch = [], stages.forward
    monkeypatch.setattr(stages, "forward", lambda *a, **k: calls.append(1) or launch(*a, **k))
    logits = random_logits(24, 8)
    balance = make_balance(logits, 1)

    def layer(x):
        routed = route(x.tanh(), 2, renormalize=True, balance=balance)
        return routed.weights.square(), routed.index

    def contexts():
        return create_selective_checkpoint_contexts(
            lambda _, op, *args, **kwargs: policy if op == OP else CheckpointPolicy.PREFER_RECOMPUTE
        )

    results = []
    for call in (layer, lambda x: checkpoint(layer, x, use_reentrant=False, context_fn=contexts)):
        leaf = logits.clone().requires_grad_()
        weights, index = call(leaf)
        weights.sum().backward()
        results.append((weights, index, leaf.grad))
    assert len(calls) == (2 if policy == CheckpointPolicy.MUST_SAVE else 3)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_a_training_step_of_a_patched_model_agrees_with_plain_torch(
    monkeypatch, model, unpatched, packed
):
    mask = torch.rand(packed.ids.shape) > 0.2
    results = []
    for m, interpret in ((model, "1"), (unpatched, "0")):
        monkeypatch.setenv("TRITON_INTERPRET", interpret)
        apply_patches(m, ["router_aux_loss"])
        statistics = router_statistics(m)
        statistics.coefficient = 0.5
        statistics.begin(mask, 1, 1 / mask.sum())
        loss = m.train()(packed.ids, labels=packed.ids, use_cache=False).loss
        loss.backward()
        tokens_per_expert = statistics.tokens_per_expert
        results.append((loss, tokens_per_expert, statistics.drain()))
    (loss, counts, drained), (expected, expected_counts, expected_drained) = results
    assert_close(loss, expected)
    assert torch.equal(counts, expected_counts)
    assert drained == pytest.approx(expected_drained, rel=1e-6)
    for (name, a), b in zip(model.named_parameters(), unpatched.parameters(), strict=True):
        assert_close(a.grad, b.grad, name=name)


def test_compiled_layers_count_and_balance_like_eager_ones(model, unpatched, packed):
    torch._dynamo.reset()
    results = []
    for m in (model, unpatched):
        apply_patches(m, ["router_aux_loss"])
        if m is model:
            for layer in m.model.layers:
                layer.compile(backend="aot_eager", fullgraph=True)
        statistics = router_statistics(m)
        statistics.begin(None, 1, torch.tensor(0.01))
        m.train()(packed.ids, labels=packed.ids, use_cache=False).loss.backward()
        results.append(statistics.drain())
    assert results[0] == pytest.approx(results[1])
    for (name, a), b in zip(model.named_parameters(), unpatched.parameters(), strict=True):
        assert_close(a.grad, b.grad, name=name)


def test_evaluation_runs_the_kernel_without_statistics(monkeypatch, model, unpatched, packed):
    seen, launch = [], stages.forward
    monkeypatch.setattr(stages, "forward", lambda *a, **k: seen.append(a) or launch(*a, **k))
    apply_patches(model, ["router_aux_loss"])
    out, expected = (m.eval()(packed.ids, use_cache=False).logits for m in (model, unpatched))
    assert [len(counts) for *_, counts, _ in seen] == [0, 0]
    assert_close(out, expected)
    assert router_statistics(model).drain() == {}

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from monkey_patch import PatchError, apply_patches, router_statistics
from monkey_patch.kernels.router.op import add_balance_gradient, routed_counts, routing_sums
from monkey_patch.kernels.router.reference import balance_loss_reference
from tests.support.oracle import assert_close

COEFFICIENT = 0.5


def _patched(model, coefficient=COEFFICIENT):
    apply_patches(model, ["router_aux_loss"])
    statistics = router_statistics(model)
    statistics.coefficient = coefficient
    return statistics


def _loss_sum(model, ids):
    """A sum over tokens, so that micro-batches add up to the whole batch."""
    return model(ids, use_cache=False).logits.float().logsumexp(-1).sum()


def _gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _assert_gradients(actual, expected, rms=2e-6):
    assert actual.keys() == expected.keys()
    for name in expected:
        assert_close(actual[name], expected[name], name=name, rms=rms)


def _upstream_aux(model, ids):
    logits = model(ids, use_cache=False, output_router_logits=True).router_logits
    config = model.config
    per_layer = [
        load_balancing_loss_func((layer,), config.num_experts, config.num_experts_per_tok)
        for layer in logits
    ]
    return sum(per_layer) / len(per_layer)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("num_rows", [1, 3])
def test_kernel_matches_the_definition(masked, num_rows):
    probs = torch.randn(24, 6, dtype=torch.float64).softmax(-1).requires_grad_()
    values, index = probs.topk(2)
    mask = torch.rand(24) > 0.3 if masked else torch.ones(24, dtype=torch.bool)
    rows = (num_rows, 24 // num_rows)
    loss = balance_loss_reference(
        probs.view(*rows, 6), index.view(*rows, 2), mask.view(rows), num_global_tokens=100
    )
    (expected,) = torch.autograd.grad(loss, probs, retain_graph=True)

    given = mask if masked else None
    counts = routed_counts(index, given, num_rows, 6)
    entropy, weighted, tokens = routing_sums(probs.detach(), given, counts)
    assert_close(weighted / 100, loss)
    assert tokens == mask.sum()
    assert_close(entropy, -(probs * probs.log())[mask].sum())
    assert counts.sum() == 2 * mask.sum()

    direct = torch.randn(24, 2, dtype=torch.float64)
    (plain,) = torch.autograd.grad(values, probs, direct, retain_graph=True)
    out = add_balance_gradient(
        values, probs, counts, given, torch.tensor(0.06, dtype=torch.float64)
    )
    assert torch.equal(out, values)
    (both,) = torch.autograd.grad(out, probs, direct)
    assert_close(both, plain + expected)


@pytest.mark.usefixtures("backend")
def test_loss_and_gradients_are_upstreams_per_layer(model, unpatched, packed):
    aux = _upstream_aux(unpatched, packed.ids)
    (_loss_sum(unpatched, packed.ids) + COEFFICIENT * aux).backward()
    statistics = _patched(model)
    statistics.begin(None, 1, torch.tensor(1 / packed.ids.numel()))
    _loss_sum(model, packed.ids).backward()
    _assert_gradients(_gradients(model), _gradients(unpatched))
    drained = statistics.drain()
    assert drained["aux_loss"] == pytest.approx(aux.item(), rel=1e-6)


def test_the_gradient_is_not_negligible(model, unpatched, packed):
    """Guards the comparison above: without the balance term it would fail."""
    _loss_sum(unpatched, packed.ids).backward()
    statistics = _patched(model)
    statistics.begin(None, 1, torch.tensor(1.0))
    _loss_sum(model, packed.ids).backward()
    gate = "model.layers.1.mlp.gate.weight"
    difference = (_gradients(model)[gate] - _gradients(unpatched)[gate]).norm()
    assert difference > 0.01 * _gradients(unpatched)[gate].norm()


@pytest.mark.usefixtures("backend")
def test_invariant_to_how_the_rows_are_cut(model, packed):
    """4 rows with padding at once, in two halves, and one by one."""
    statistics = _patched(model)
    ids = packed.ids.repeat(1, 2)[:, :96].reshape(4, 24)
    mask = torch.ones_like(ids, dtype=torch.bool)
    for row, padding in enumerate((0, 3, 11, 7)):
        mask[row, 24 - padding :] = False
    results = []
    for size in (4, 2, 1):
        model.zero_grad()
        for part, part_mask in zip(ids.split(size), mask.split(size), strict=True):
            statistics.begin(part_mask, size, 1 / mask.sum())
            _loss_sum(model, part).backward()
        counts = statistics.tokens_per_expert.clone()
        results.append((_gradients(model), statistics.drain(), counts))
    for gradients, drained, counts in results[1:]:
        _assert_gradients(gradients, results[0][0], rms=1e-6)
        assert drained == pytest.approx(results[0][1], rel=1e-6)
        assert torch.equal(counts, results[0][2])
    assert results[0][2].sum(dim=1).tolist() == [2 * mask.sum()] * 2


def test_collapsed_layers_score_e_even_when_each_collapses_elsewhere(make_model, packed):
    """Upstream pools the layers first and scores these 8 layers 2.0, the same as uniform ones."""
    model = make_model(num_hidden_layers=8, mlp_only_layers=[], num_experts=16)
    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):
            layer.post_attention_layernorm.weight.zero_()[0] = 1.0
            layer.post_attention_layernorm.register_forward_hook(lambda m, a, out: out.abs() + 1)
            layer.mlp.gate.weight.zero_()[2 * i : 2 * i + 2] = 100.0
    logits = model(packed.ids, output_router_logits=True).router_logits
    assert load_balancing_loss_func(logits, 16, 2).item() == pytest.approx(2.0, rel=1e-3)
    statistics = _patched(model)
    statistics.begin(None, 1, torch.tensor(1.0))
    model(packed.ids)
    assert statistics.drain()["aux_loss"] == pytest.approx(16.0, rel=1e-3)


def test_outputs_are_bit_equal_and_hooks_fire(model, unpatched, packed):
    statistics = _patched(model)
    statistics.begin(None, 1, torch.tensor(1.0))
    options = {"use_cache": False, "output_router_logits": True}
    out, expected = (m(packed.ids, **options) for m in (model, unpatched))
    assert torch.equal(out.logits, expected.logits)
    for a, e in zip(out.router_logits, expected.router_logits, strict=True):
        assert torch.equal(a, e)


@pytest.mark.usefixtures("backend")
def test_statistics_count_real_tokens(model, unpatched, packed):
    statistics = _patched(model)
    mask = torch.ones_like(packed.ids, dtype=torch.bool)
    mask[0, 50:] = False
    for _ in range(2):
        statistics.begin(mask, 1, torch.tensor(1.0))
        model(packed.ids, use_cache=False)
    logits = unpatched(packed.ids, use_cache=False, output_router_logits=True).router_logits
    expected = torch.stack(
        [torch.bincount(x[:50].topk(2).indices.flatten(), minlength=8) for x in logits]
    )
    assert torch.equal(statistics.tokens_per_expert, 2 * expected)
    load = (expected.max(dim=1).values / (50 * 2 / 8)).max().item()
    probs = torch.stack(logits)[:, :50].softmax(-1)
    drained = statistics.drain()
    assert drained["expert_load_max_over_mean"] == pytest.approx(load)
    assert drained["router_entropy"] == pytest.approx(
        -(probs * probs.log()).sum(-1).mean().item(), rel=1e-6
    )
    assert statistics.tokens_per_expert.sum() == 0
    assert statistics.drain() == {}


def test_drain_reduces_once_over_ranks(model, packed):
    statistics = _patched(model)
    calls = []
    statistics.begin(None, 1, torch.tensor(1.0))
    model(packed.ids)
    alone = copy.deepcopy(statistics).drain()
    both = statistics.drain(lambda t: calls.append(t.shape) or 2 * t)
    assert both == pytest.approx(alone)
    assert len(calls) == 1


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputed_layers_count_once_and_give_the_same_gradients(model, packed, use_reentrant):
    other = copy.deepcopy(model)
    results, calls = [], []
    for m in (model, other):
        statistics = _patched(m)
        if m is other:
            m.train().activation_checkpointing_enable({"use_reentrant": use_reentrant})
            m.enable_input_require_grads()
            m.model.layers[1].mlp.gate.register_forward_hook(lambda *_: calls.append(1))
        statistics.begin(None, 1, torch.tensor(0.01))
        _loss_sum(m.train(), packed.ids).backward()
        results.append((_gradients(m), statistics.tokens_per_expert))
    assert len(calls) == 2, "the layer was not recomputed"
    _assert_gradients(results[1][0], results[0][0])
    assert torch.equal(results[1][1], results[0][1])
    assert results[0][1].sum(dim=1).tolist() == [2 * packed.ids.numel()] * 2


def test_keeps_no_further_token_by_expert_tensor_alive(model, unpatched, packed):
    def saved(m):
        elements = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: elements.append(t.numel()) or t, lambda t: t
        ):
            m(packed.ids, use_cache=False)
        return sum(elements)

    statistics = _patched(model)
    mask = torch.ones_like(packed.ids, dtype=torch.bool)
    statistics.begin(mask, 1, torch.tensor(1.0))
    extra_per_layer = (saved(model) - saved(unpatched)) / 2
    tokens, experts = packed.ids.numel(), 8
    # (R, E) slopes and the mask that all layers share.
    assert extra_per_layer <= experts + tokens
    assert extra_per_layer < tokens * experts / 2


def test_evaluation_counts_and_injects_nothing(model, unpatched, packed):
    statistics = _patched(model)
    for m in (model, unpatched):
        _loss_sum(m.eval(), packed.ids).backward()
    _assert_gradients(_gradients(model), _gradients(unpatched), rms=0.0)
    assert statistics.drain() == {}


def test_a_training_forward_has_to_be_announced(model, packed):
    statistics = _patched(model)
    with pytest.raises(PatchError, match=r"before RouterStatistics.begin\(\)"):
        model(packed.ids)
    statistics.begin(torch.ones(7, dtype=torch.bool), 1, torch.tensor(1.0))
    with pytest.raises(PatchError, match=r"sees 64 tokens .* announced 1 rows and a mask of 7"):
        model(packed.ids)
    statistics.begin(None, 3, torch.tensor(1.0))
    with pytest.raises(PatchError, match=r"sees 64 tokens .* announced 3 rows and no mask"):
        model(packed.ids)


def test_a_copy_has_statistics_of_its_own(model, packed):
    statistics = _patched(model)
    clone = copy.deepcopy(model)
    assert router_statistics(clone) is not statistics
    router_statistics(clone).begin(None, 1, torch.tensor(1.0))
    clone(packed.ids)
    assert router_statistics(clone).tokens_per_expert.sum() > 0
    assert statistics.tokens_per_expert.sum() == 0


def test_patch_serves_qwen3_vl_moe(vl_model, packed):
    unpatched = copy.deepcopy(vl_model)
    statistics = _patched(vl_model)
    statistics.begin(None, 1, torch.tensor(0.01))
    assert torch.equal(vl_model(packed.ids).logits, unpatched(packed.ids).logits)
    assert statistics.tokens_per_expert.sum(dim=1).tolist() == [128, 128]


def test_refusals(model, packed):
    with pytest.raises(PatchError, match="is not patched with 'router_aux_loss'"):
        router_statistics(model)
    model.config.output_router_logits = True
    with pytest.raises(PatchError, match=r"output_router_logits is True.*set it to False"):
        apply_patches(model, ["router_aux_loss"])
    model.config.output_router_logits = False
    gate = model.model.layers[2].mlp.gate
    gate.__class__ = type("SigmoidTopKRouter", (type(gate),), {})
    with pytest.raises(PatchError, match=r"2.mlp.gate is a SigmoidTopKRouter, which.*it knows"):
        apply_patches(model, ["router_aux_loss"])


@pytest.mark.parametrize("model_type", ["deepseek_v3", "mixtral", "gpt_oss", "glm4_moe", "jetmoe"])
def test_other_routers_are_refused_by_name(model_type):
    """Their configs may lack what those of the known ones have."""
    config = AutoConfig.for_model(model_type, num_hidden_layers=4)
    with torch.device("meta"):
        stranger = AutoModelForCausalLM.from_config(config)
    with pytest.raises(
        PatchError, match=r"is a .*(Router|Gating), which routes .* it knows Qwen3Moe"
    ):
        apply_patches(stranger, ["router_aux_loss"])

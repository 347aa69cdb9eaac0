"""The patch: which layers compute in FP8, what stays, under checkpointing, compile and sharding."""

import copy
from collections import Counter
from itertools import combinations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from monkey_patch import PATCHES, PatchError, apply_patches, router_statistics
from monkey_patch.experts_fp8 import experts_fp8
from qwen3_sft.model.activation_checkpointing import enable_checkpointing
from tests.support.oracle import assert_close

LAYERS = 4
OP = "monkey_patch.scatter_moe.default"


@pytest.fixture
def model(make_model):
    """Four mixture-of-experts layers, of which the first and the last stay as they are."""
    return make_model(num_hidden_layers=LAYERS, mlp_only_layers=[])


def experts_of(model):
    return [layer.mlp.experts for layer in model.model.layers]


def run_experts(experts, tokens=33):
    """Output and gradients of one experts module on inputs that depend on nothing."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, 64, generator=generator).requires_grad_()
    index = torch.rand(tokens, 8, generator=generator).argsort(dim=1)[:, :2]
    weights = torch.rand(tokens, 2, generator=generator).requires_grad_()
    out = experts(x, index, weights)
    leaves = (x, weights, experts.gate_up_proj, experts.down_proj)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


def scalings(model):
    return [vars(experts).get("fp8_scaling") for experts in experts_of(model)]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("scaling", ["blockwise", "rowwise", "mxfp8"])
def test_inner_layers_are_in_fp8_and_the_outer_ones_bit_equal(model, unpatched, scaling, recompute):
    apply_patches(unpatched, ["scatter_moe"])
    apply_patches(model, [experts_fp8(scaling=scaling, recompute_hidden=recompute)])
    assert scalings(model) == [None, scaling, scaling, None]
    for i, (experts, exact) in enumerate(
        zip(experts_of(model), experts_of(unpatched), strict=True)
    ):
        for got, truth in zip(run_experts(experts), run_experts(exact), strict=True):
            if i in (0, LAYERS - 1):
                assert torch.equal(got, truth)
            else:
                assert_close(got, truth, rms=0.15)
                assert not torch.allclose(got, truth, rtol=1e-3)


@pytest.mark.parametrize("recompute", [False, True])
def test_hidden_is_kept_or_computed_again_in_every_layer(model, recompute):
    apply_patches(model, [experts_fp8(recompute_hidden=recompute)])
    tokens, shapes = 33, []

    def keep(tensor):
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        for experts in experts_of(model):
            experts(torch.randn(tokens, 64), torch.zeros(tokens, 2).long(), torch.ones(tokens, 2))
    hidden = (2 * tokens, 2 * model.config.moe_intermediate_size)
    assert shapes.count(hidden) == (0 if recompute else LAYERS)


def test_the_scalings_differ(model):
    found = []
    for scaling in ("blockwise", "rowwise", "mxfp8"):
        clone = copy.deepcopy(model)
        apply_patches(clone, [experts_fp8(scaling=scaling)])
        found.append(run_experts(experts_of(clone)[1])[0])
    assert not any(torch.equal(a, b) for a, b in combinations(found, 2))


def test_patterns_keep_more(model):
    apply_patches(model, [experts_fp8(keep=["model.layers.1.*"])])
    assert scalings(model) == [None, None, "blockwise", None]


def test_nothing_left_is_an_error_and_changes_nothing(model):
    before = model.config._experts_implementation
    with pytest.raises(PatchError, match="convert nothing"):
        apply_patches(model, [experts_fp8(keep=["model.layers.*"])])
    assert model.config._experts_implementation == before
    assert scalings(model) == [None] * LAYERS


def test_an_unknown_scaling_is_named():
    with pytest.raises(PatchError, match="scaling 'tensorwise'; there are blockwise, rowwise, mx"):
        experts_fp8(scaling="tensorwise")


def test_revert_restores_everything(model, unpatched, packed):
    expected = unpatched(packed.ids).logits
    before = [sorted(vars(m)) for m in model.modules()]
    with apply_patches(model, ["experts_fp8"]) as applied:
        assert applied.counts == {"experts_fp8": 1 + 2}
        assert model.config._experts_implementation == "scatter_moe_fp8"
        assert not torch.equal(model(packed.ids).logits, expected)
    after = [sorted(set(vars(m)) - {"_applied_patches"}) for m in model.modules()]
    assert after == before
    assert torch.equal(model(packed.ids).logits, expected)


def test_a_scaling_changed_by_others_is_not_reverted_over(model):
    applied = apply_patches(model, ["experts_fp8"])
    experts_of(model)[1].fp8_scaling = "rowwise"
    with pytest.raises(PatchError, match=r"layers\.1\.mlp\.experts\.fp8_scaling was changed"):
        applied.revert()


@pytest.mark.parametrize("other", ["scatter_moe", "scatter_moe_recompute", "experts_fp8_recompute"])
@pytest.mark.parametrize("earlier", [False, True])
def test_other_choices_for_the_experts_conflict(model, other, earlier):
    patches = [experts_fp8(recompute_hidden=True) if other.startswith("experts") else other]
    if earlier:
        apply_patches(model, patches)
        patches.clear()
    with pytest.raises(PatchError, match=rf"'{other}' and 'experts_fp8' both replace"):
        apply_patches(model, [*patches, "experts_fp8"])


def test_parameters_and_keys_stay(model, unpatched, packed):
    apply_patches(model, ["experts_fp8"])
    model(packed.ids, labels=packed.ids).loss.backward()
    state, expected = model.state_dict(), unpatched.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    for (name, a), b in zip(model.named_parameters(), unpatched.parameters(), strict=True):
        assert (type(a), a.dtype, a.grad.dtype) == (type(b), b.dtype, b.dtype), name


def test_bfloat16_and_autocast(model, packed):
    apply_patches(model, ["experts_fp8"])
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(packed.ids, labels=packed.ids).loss
    loss.backward()
    narrow = copy.deepcopy(model).bfloat16()
    assert narrow(packed.ids, labels=packed.ids).loss.item() == pytest.approx(loss.item(), rel=0.02)


def local_experts(experts, rank):
    """One of two ranks' half of a module, as transformers' expert parallelism leaves it."""
    local = copy.deepcopy(experts)
    half = experts.num_experts // 2
    for name in ("gate_up_proj", "down_proj"):
        whole = getattr(experts, name)
        setattr(local, name, torch.nn.Parameter(whole[rank * half : (rank + 1) * half].detach()))
    local.num_experts, local._is_expert_parallel, local._is_hooked = half, True, True
    original = local.forward

    def dispatch(x, index, weights):
        is_local = index // half == rank
        return original(
            x, torch.where(is_local, index % half, half), torch.where(is_local, weights, 0.0)
        )

    local.forward = dispatch
    return local


@pytest.mark.parametrize("scaling", ["blockwise", "rowwise", "mxfp8"])
@pytest.mark.parametrize("tokens", [33, 1, 0])
def test_halves_of_the_experts_add_up_to_the_whole(model, scaling, tokens):
    """A weight is quantised expert by expert and a token by itself, wherever they lie."""
    apply_patches(model, [experts_fp8(scaling=scaling)])
    experts = experts_of(model)[1]
    whole = run_experts(experts, tokens)[0]
    x = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(1))
    parts = [run_experts(local_experts(experts, rank), tokens)[0] for rank in (0, 1)]
    assert_close(parts[0] + parts[1], whole)
    assert len(x) == len(whole)


def test_sharded_experts_are_converted_too(model):
    """The patch may come after expert parallelism has replaced the forward of the module."""
    for i in (1, 2):
        model.model.layers[i].mlp.experts = local_experts(experts_of(model)[i], 0)
    apply_patches(model, ["experts_fp8"])
    assert scalings(model) == [None, "blockwise", "blockwise", None]
    assert torch.isfinite(run_experts(experts_of(model)[1])[0]).all()


def test_a_replaced_forward_is_refused(model):
    vars(experts_of(model)[1])["forward"] = lambda *a: a[0]
    with pytest.raises(PatchError, match=r"'scatter_moe_fp8'.*has a replaced forward"):
        apply_patches(model, ["experts_fp8"])


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def test_checkpointing_changes_no_bit_and_keeps_the_operator(model, packed):
    found = {}
    for kind in ("none", "full", "selective"):
        clone = copy.deepcopy(model).train()
        clone.config.use_cache = False
        patches = [experts_fp8(recompute_hidden=True), "varlen_attention", "router_aux_loss"]
        apply_patches(clone, patches)
        router_statistics(clone).begin(None, 1, torch.tensor(1.0))
        enable_checkpointing(clone, {kind: LAYERS})
        with Operators() as operators:
            loss = clone(packed.ids, labels=packed.ids, **packed.isolation, **packed.lengths).loss
            forward = operators.counts[OP]
            loss.backward()
        gradients = {name: p.grad for name, p in clone.named_parameters()}
        found[kind] = loss.detach(), gradients, forward, operators.counts[OP] - forward
    loss, gradients, forward, _ = found["none"]
    assert forward == LAYERS
    assert {kind: result[3] for kind, result in found.items()} == {
        "none": 0, "full": LAYERS, "selective": 0
    }  # fmt: skip
    for kind in ("full", "selective"):
        assert torch.equal(found[kind][0], loss)
        differing = [n for n, g in gradients.items() if not torch.equal(found[kind][1][n], g)]
        assert not differing, kind


def test_it_stands_in_the_list():
    assert [patch.name for patch in PATCHES].count("experts_fp8") == 1

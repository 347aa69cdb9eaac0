"""What every patch promises, checked for each of them and for every pair."""

import copy
import dataclasses
import itertools

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import Qwen3MoeForCausalLM

from monkey_patch import PATCHES, PatchError, apply_patches, router_statistics
from tests.support.oracle import assert_close

# Of patches that replace the same attribute, the first.
LATER = ("scatter_moe_recompute", "experts_fp8")
TOGETHER = [patch for patch in PATCHES if patch.name not in LATER]
SINGLES = [pytest.param((patch,), id=patch.name) for patch in PATCHES]
# Of these the first and the last decoder layer are another kind of layer than the rest, and what
# they compute is compared with the unpatched model as far as FP8 allows.
LOSSY = {patch.name for patch in PATCHES if patch.name.endswith("_fp8")}
PAIRS = [
    pytest.param(pair, id="-".join(patch.name for patch in pair))
    for pair in itertools.combinations(PATCHES, 2)
]


def _apply(model, patches):
    """Apply and bring the model to where it has to agree with the unpatched one."""
    applied = apply_patches(model, patches)
    if "router_aux_loss" in applied.names:
        statistics = router_statistics(model)
        statistics.coefficient = 0.0
        statistics.begin(None, 1, torch.tensor(1.0))
    return applied


def _logits(model, packed):
    return model(packed.ids, **packed.isolation, **packed.lengths).logits


def _loss(model, packed):
    """The batch of the training loop; upstream passes over the keywords it does not know."""
    batch = {**packed.isolation, **packed.lengths, **packed.labelled}
    return model(packed.ids, labels=packed.labels, **batch).loss


def _is_lossy(patches):
    return any(patch.name in LOSSY for patch in patches)


def _assert_agrees(model, unpatched, packed, tolerance):
    assert_close(_logits(model, packed), _logits(unpatched, packed), name="logits", rms=tolerance)
    loss, expected = (_loss(m, packed) for m in (model, unpatched))
    assert_close(loss, expected, name="loss", rms=tolerance)
    for each, m in ((loss, model), (expected, unpatched)):
        m.zero_grad()
        each.backward()
    for (name, a), e in zip(model.named_parameters(), unpatched.parameters(), strict=True):
        assert_close(a.grad, e.grad, name=name, rms=tolerance)


def _layout(model):
    return {name: (t.shape, t.dtype) for name, t in model.state_dict().items()}


def _identities(model):
    """Everything a patch may replace: modules, their own attributes, the configs' attributes."""
    modules = [(name, id(module), sorted(vars(module))) for name, module in model.named_modules()]
    return modules, dict(vars(model.config))


@pytest.mark.parametrize("patches", SINGLES + PAIRS)
def test_agrees_with_the_unpatched_model_or_conflicts_by_name(model, unpatched, packed, patches):
    layout, names = _layout(model), [name for name, _ in model.named_parameters()]
    tolerance = max(patch.tolerance for patch in patches)
    try:
        _apply(model, patches)
    except PatchError as error:
        assert len(patches) == 2
        assert all(repr(patch.name) in str(error) for patch in patches)  # noqa: PT017
        return
    assert _layout(model) == layout
    assert [name for name, _ in model.named_parameters()] == names
    _assert_agrees(model, unpatched, packed, tolerance)


@pytest.mark.parametrize("patches", SINGLES)
def test_revert_restores_identity(model, unpatched, packed, patches):
    _logits(model, packed)  # upstream installs its recording hooks at the first forward
    _apply(model, patches).revert()
    before = _identities(model)
    with _apply(model, patches) as applied:
        assert set(applied.counts) == {patches[0].name}
        assert _identities(model) != before
        _loss(model, packed).backward()
    assert _identities(model) == before
    assert torch.equal(_logits(model, packed), _logits(unpatched, packed))


@pytest.mark.parametrize("patches", SINGLES)
def test_an_unmet_requirement_is_named_and_changes_nothing(model, patches):
    before = _identities(model)
    impossible = dataclasses.replace(patches[0], requires=(*patches[0].requires, "torch>=99"))
    with pytest.raises(
        PatchError, match=rf"{patches[0].name}.*torch>=99 \(found {torch.__version__[:4]}"
    ):
        apply_patches(model, [impossible])
    assert _identities(model) == before


@pytest.mark.parametrize("patches", SINGLES)
def test_twice_is_an_error(model, patches):
    apply_patches(model, patches)
    with pytest.raises(PatchError, match=f"'{patches[0].name}' is already applied"):
        apply_patches(model, patches)


@pytest.mark.parametrize("patches", SINGLES)
def test_saved_weights_load_into_an_unpatched_model(model, packed, patches, tmp_path):
    _apply(model, patches)
    model.save_pretrained(tmp_path)
    loaded = Qwen3MoeForCausalLM.from_pretrained(tmp_path)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    implementations = (loaded.config._attn_implementation, loaded.config._experts_implementation)
    assert implementations == ("sdpa", "grouped_mm")
    rms = patches[0].tolerance if _is_lossy(patches) else None
    assert_close(_logits(loaded, packed), _logits(model.eval(), packed), rms=rms)


@pytest.mark.parametrize("patches", SINGLES)
def test_a_deepcopy_is_patched_and_independent(model, unpatched, packed, patches):
    applied = _apply(model, patches)
    clone = copy.deepcopy(model)
    originals = {id(module) for module in model.modules()} | {id(model.config)}
    for module in clone.modules():
        for replacement in itertools.chain(*vars(module).get("_applied_patches", {}).values()):
            assert id(replacement.owner) not in originals
    applied.revert()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    _assert_agrees(clone, unpatched, packed, patches[0].tolerance)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("patches", SINGLES)
def test_activation_checkpointing(model, unpatched, packed, patches, use_reentrant):
    _apply(model, patches)
    for m in (model, unpatched):
        m.train().activation_checkpointing_enable({"use_reentrant": use_reentrant})
        m.enable_input_require_grads()
    _assert_agrees(model, unpatched, packed, patches[0].tolerance)


@pytest.mark.parametrize("patches", [*SINGLES, pytest.param(TOGETHER, id="all")])
def test_decoder_layers_compile_to_one_graph_that_they_share(make_model, packed, patches):
    """Without the packing keywords: on a CPU their document boundaries are read on the host."""
    torch.compiler.reset()
    counters.clear()
    model = make_model(num_hidden_layers=12, mlp_only_layers=[])
    unpatched = copy.deepcopy(model)
    _apply(model, patches)
    if _is_lossy(patches):
        _apply(unpatched, patches)
    for layer in model.model.layers:
        layer.compile(backend="eager", fullgraph=True)
    out, expected = (m(packed.ids, use_cache=False).logits for m in (model, unpatched))
    assert counters["stats"]["unique_graphs"] == 1 + _is_lossy(patches)
    assert_close(out, expected, name="logits")
    for logits in (out, expected):
        logits.square().mean().backward()
    for (name, a), e in zip(model.named_parameters(), unpatched.parameters(), strict=True):
        assert_close(a.grad, e.grad, name=name)

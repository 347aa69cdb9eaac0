import copy
import inspect

import pytest
import torch
from torch import nn

from monkey_patch import PatchError, apply_patches
from monkey_patch.kernels.linear_cross_entropy import linear_cross_entropy_sum
from monkey_patch.kernels.linear_cross_entropy.reference import linear_cross_entropy_sum_reference
from tests.support.oracle import RMS_TOLERANCE, assert_close


def _inputs(N=37, D=24, V=50, dtype=torch.float32):
    hidden, weight = torch.randn(N, D).to(dtype), torch.randn(V, D).to(dtype)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(0, V, (N,))


def _run(function, hidden, weight, targets, dtype=None, **options):
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (hidden, weight)]
    loss = function(*leaves, targets, **options)
    (loss * 0.3).backward()
    return [loss, *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("chunk_tokens", [1, 8, 37, 1000])
def test_loss_and_gradients_match_the_definition(dtype, chunk_tokens):
    inputs = _inputs(dtype=dtype)
    truth = _run(linear_cross_entropy_sum_reference, *inputs, dtype=torch.float64)
    got = _run(linear_cross_entropy_sum, *inputs, chunk_tokens=chunk_tokens)
    assert got[0].dtype == torch.promote_types(dtype, torch.float32)
    for name, a, e in zip(("loss", "hidden", "weight"), got, truth, strict=True):
        assert_close(a, e, name=name, rms=RMS_TOLERANCE[dtype])


def test_large_logits_do_not_overflow():
    hidden, weight, targets = _inputs()
    got = _run(linear_cross_entropy_sum, hidden * 1e3, weight, targets)
    truth = _run(linear_cross_entropy_sum_reference, hidden * 1e3, weight, targets, torch.float64)
    for name, a, e in zip(("loss", "hidden", "weight"), got, truth, strict=True):
        assert_close(a, e, name=name)


def test_no_labelled_position_still_reaches_every_parameter():
    loss, d_hidden, d_weight = _run(linear_cross_entropy_sum, *_inputs(N=0))
    assert loss == 0
    assert d_hidden.shape == (0, 24)
    assert torch.equal(d_weight, torch.zeros(50, 24))


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_gradients_only_for_what_requires_them(frozen):
    hidden, weight, targets = _inputs()
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.shape) or t, lambda t: t
    ):
        linear_cross_entropy_sum(hidden, weight, targets).backward()
    assert saved == [torch.Size([50, 24] if frozen == "hidden" else [37, 24])]
    assert (hidden if frozen == "hidden" else weight).grad is None


def test_without_grad_mode_nothing_is_attached():
    with torch.no_grad():
        assert not linear_cross_entropy_sum(*_inputs()).requires_grad


def test_a_retained_graph_gives_the_same_gradients_twice():
    hidden, weight, targets = _inputs()
    loss = linear_cross_entropy_sum(hidden, weight, targets) * 3
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_never_holds_all_logits():
    """The largest tensor that an operation returns is the gradient of the hidden states."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            outs = out if isinstance(out, tuple) else (out,)
            sizes.extend(t.numel() for t in outs if isinstance(t, torch.Tensor))
            return out

    hidden, weight, targets = _inputs(N=400, D=8, V=50)
    with Recorder():
        linear_cross_entropy_sum(hidden, weight, targets, chunk_tokens=10).backward()
    assert max(sizes) == 400 * 8


def test_autocast_runs_in_its_dtype_with_full_precision_gradients():
    inputs = _inputs()
    truth = _run(linear_cross_entropy_sum_reference, *inputs, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        got = _run(linear_cross_entropy_sum, *inputs, chunk_tokens=8)
    for name, a, e in zip(("loss", "hidden", "weight"), got, truth, strict=True):
        assert a.dtype == torch.float32
        assert_close(a, e, name=name, rms=RMS_TOLERANCE[torch.bfloat16])
    assert (got[1].double() - truth[1]).norm() / truth[1].norm() > 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_ND": torch.zeros(37, 23)}, r"hidden has shape \(37, 23\)"),
        ({"targets_N": torch.zeros(36).long()}, r"targets have shape \(36,\), expected \(37,\)"),
        ({"weight_VD": torch.zeros(50, 24).bfloat16()}, "weight torch.bfloat16"),
        ({"chunk_tokens": 0}, "chunk_tokens is 0"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = dict(zip(("hidden_ND", "weight_VD", "targets_N"), _inputs(), strict=True))
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy_sum(**{**arguments, **change})


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("num_items", [None, 20, torch.tensor(20)])
def test_labelled_positions_give_upstreams_loss_and_gradients(make_model, packed, tied, num_items):
    model = make_model(tie_word_embeddings=tied)
    unpatched = copy.deepcopy(model)
    expected = unpatched(
        packed.ids, labels=packed.labels, num_items_in_batch=num_items, **packed.isolation
    )
    expected.loss.backward()
    apply_patches(model, ["linear_cross_entropy"])
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    out = model(
        packed.ids,
        labels=packed.labels,
        num_items_in_batch=num_items,
        **packed.isolation,
        **packed.labelled,
    )
    out.loss.backward()
    assert out.logits is None
    assert type(out) is type(expected)
    assert_close(out.loss, expected.loss)
    for (name, a), e in zip(model.named_parameters(), unpatched.parameters(), strict=True):
        assert_close(a.grad, e.grad, name=name)


def test_without_positions_it_is_upstream(model, unpatched, packed):
    apply_patches(model, ["linear_cross_entropy"])
    out, expected = (m(packed.ids, labels=packed.labels) for m in (model, unpatched))
    assert torch.equal(out.logits, expected.logits)
    assert torch.equal(out.loss, expected.loss)
    options = {"max_new_tokens": 5, "do_sample": False}
    prompt = packed.ids[:, :9]
    assert torch.equal(model.generate(prompt, **options), unpatched.generate(prompt, **options))


def test_the_signature_keeps_upstreams_names_and_adds_its_own(model, unpatched):
    apply_patches(model, ["linear_cross_entropy"])
    added = set(inspect.signature(model.forward).parameters) - set(
        inspect.signature(unpatched.forward).parameters
    )
    assert added == {"label_positions", "label_targets", "num_items_in_batch"}


def test_the_loss_runs_inside_the_head_module(model, packed):
    """Hooks of the head, such as those that gather its weight, fire; also ones set before."""
    shapes = []
    model.lm_head.register_forward_hook(
        lambda _, args, out: shapes.append((args[0].shape, out.shape))
    )
    head, weight = model.lm_head, model.lm_head.weight
    apply_patches(model, ["linear_cross_entropy"])
    assert model.lm_head is head
    assert model.lm_head.weight is weight
    model(packed.ids, **packed.isolation, **packed.labelled)
    assert shapes == [((len(packed.labelled["label_targets"]), 64), ())]


def test_a_frozen_head_gets_no_gradient(model, packed):
    model.lm_head.requires_grad_(False)
    apply_patches(model, ["linear_cross_entropy"])
    model(packed.ids, **packed.isolation, **packed.labelled).loss.backward()
    assert model.lm_head.weight.grad is None
    assert model.model.norm.weight.grad.abs().sum() > 0


def test_tuple_output(model, packed):
    apply_patches(model, ["linear_cross_entropy"])
    out = model(packed.ids, return_dict=False, **packed.isolation, **packed.labelled)
    assert isinstance(out, tuple)
    assert out[0].ndim == 0


def test_misuse_is_named(model, packed):
    apply_patches(model, ["linear_cross_entropy"])
    with pytest.raises(ValueError, match="label_positions and label_targets together"):
        model(packed.ids, label_targets=packed.labelled["label_targets"])
    with pytest.raises(ValueError, match="output_router_logits=False"):
        model(packed.ids, output_router_logits=True, **packed.labelled)


def test_patch_serves_qwen3_vl_moe(vl_model, packed):
    unpatched = copy.deepcopy(vl_model)
    expected = unpatched(packed.ids, labels=packed.labels, use_cache=False).loss
    expected.backward()
    apply_patches(vl_model, ["linear_cross_entropy"])
    loss = vl_model(packed.ids, use_cache=False, **packed.labelled).loss
    loss.backward()
    assert_close(loss, expected)
    assert_close(vl_model.lm_head.weight.grad, unpatched.lm_head.weight.grad)


def _lora_head(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["lm_head"])
    return peft.get_peft_model(model, config)


def _replaced_head(model):
    model.lm_head.forward = model.lm_head.forward
    return model


def _biased_head(model):
    model.lm_head = nn.Linear(64, 320)
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_lora_head, r"lm_head is peft.*Linear, not nn.Linear.*target_modules"),
        (_replaced_head, "lm_head has a replaced forward"),
        (_biased_head, "lm_head has a bias"),
        (lambda model: model.model, "matches nothing in Qwen3MoeModel"),
    ],
    ids=["lora", "replaced", "bias", "no head"],
)
def test_patch_refuses_by_name(model, change, message):
    with pytest.raises(PatchError, match=message):
        apply_patches(change(model), ["linear_cross_entropy"])

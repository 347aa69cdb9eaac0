import pytest
import torch
from torch import nn

from monkey_patch import PatchError, apply_patches
from monkey_patch.kernels.scatter_moe import scatter_moe
from monkey_patch.kernels.scatter_moe.reference import scatter_moe_reference
from tests.monkey_patch.kernels.experts import NAMES, make_inputs, run_with_gradients
from tests.support.oracle import RMS_TOLERANCE, assert_close


def _assert_matches(tensors, index):
    truth = run_with_gradients(scatter_moe_reference, tensors, index, torch.float64)
    got = run_with_gradients(scatter_moe, tensors, index)
    for name, a, e in zip(("out", *NAMES), got, truth, strict=True):
        assert_close(a, e, name=name)
    return got


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("T", "K"), [(37, 2), (64, 1), (1, 8), (3, 4)])
@pytest.mark.usefixtures("backend", "poisoned")
def test_forward_and_gradients_match_the_definition(dtype, T, K):
    _assert_matches(*make_inputs(T=T, K=K, dtype=dtype))


@pytest.mark.parametrize(
    "index",
    [
        torch.full((24, 1), 5),
        torch.tensor([[0, 7], [7, 8], [8, 8], [9, 1]]),
        torch.full((4, 2), 8),
        torch.tensor([[3, 3], [2, 2]]),
        torch.multinomial(torch.arange(1, 9).pow(-3.0), 600, replacement=True).view(300, 2),
    ],
    ids=["one expert", "sentinels", "sentinels only", "an expert twice", "skewed"],
)
@pytest.mark.usefixtures("backend", "poisoned")
def test_unusual_routing(index):
    tensors, _ = make_inputs(T=len(index), K=index.shape[1])
    out, dx, d_gate_up, d_down, d_weights = _assert_matches(tensors, index)
    is_routed = index < 8
    assert (d_weights[~is_routed] == 0).all()
    assert (out[~is_routed.any(dim=1)] == 0).all()
    assert (dx[~is_routed.any(dim=1)] == 0).all()
    unused = [e for e in range(8) if not (index == e).any()]
    assert (d_gate_up[unused] == 0).all()
    assert (d_down[unused] == 0).all()


@pytest.mark.usefixtures("backend")
def test_no_tokens():
    out, *grads = run_with_gradients(scatter_moe, *make_inputs(T=0))
    assert out.shape == (0, 48)
    assert all((g == 0).all() for g in grads)
    assert grads[1].shape == (8, 64, 48)


@pytest.mark.usefixtures("backend", "poisoned")
@pytest.mark.parametrize(("D", "F", "E"), [(50, 30, 8), (63, 33, 5), (16, 1, 1)])
def test_odd_sizes(D, F, E):
    _assert_matches(*make_inputs(D=D, F=F, E=E, K=1))


@pytest.mark.usefixtures("backend")
def test_non_contiguousmake_inputs():
    tensors, index = make_inputs()
    strided = [t.transpose(-2, -1).contiguous().transpose(-2, -1) for t in tensors]
    assert not any(t.is_contiguous() for t in strided)
    got = [scatter_moe(*a[:3], index, a[3]) for a in (tensors, strided)]
    assert_close(got[1], got[0])


@pytest.mark.usefixtures("backend")
def test_two_runs_are_bit_equal():
    inputs = make_inputs(T=200, dtype=torch.bfloat16)
    for a, b in zip(
        run_with_gradients(scatter_moe, *inputs),
        run_with_gradients(scatter_moe, *inputs),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("backend")
def test_autocast_computes_in_its_dtype_and_returns_themake_inputs():
    tensors, index = make_inputs()
    truth = run_with_gradients(scatter_moe_reference, tensors, index, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        got = run_with_gradients(scatter_moe, tensors, index)
    for name, a, e in zip(("out", *NAMES), got, truth, strict=True):
        assert a.dtype == torch.float32
        assert_close(a, e, name=name, rms=RMS_TOLERANCE[torch.bfloat16])
    error = (got[0].double() - truth[0]).norm() / truth[0].norm()
    assert error > 1e-4, "the products did not run in bfloat16"


@pytest.mark.parametrize(
    ("position", "replacement", "message"),
    [
        (0, torch.zeros(37, 47), r"x has shape \(37, 47\)"),
        (1, torch.zeros(8, 48, 64), r"gate_up_proj has shape \(8, 48, 64\), expected \(E, 2F, D\)"),
        (2, torch.zeros(8, 48, 32).bfloat16(), "down_proj torch.bfloat16"),
        (3, torch.zeros(36, 2), r"top_k_weights has shape \(36, 2\)"),
        (3, torch.zeros(37, 2).long(), "top_k_weights torch.int64"),
        (0, torch.zeros(37, 48, device="meta"), "on cpu, meta"),
    ],
)
def test_wrong_arguments_are_named(position, replacement, message):
    tensors, index = make_inputs()
    tensors[position] = replacement
    with pytest.raises(ValueError, match=message):
        scatter_moe(*tensors[:3], index, tensors[3])


def test_patch_points_the_config_at_the_op(model, unpatched, packed):
    expected = unpatched(packed.ids).logits
    with apply_patches(model, ["scatter_moe"]) as applied:
        assert model.config._experts_implementation == "scatter_moe"
        assert applied.counts == {"scatter_moe": 1}
        assert_close(model(packed.ids).logits, expected)
        assert "scatter_moe" not in model.config.to_json_string()
    assert model.config._experts_implementation == unpatched.config._experts_implementation


def test_patch_serves_qwen3_vl_moe(vl_model, packed):
    expected = vl_model(packed.ids).logits
    calls = []
    experts = vl_model.model.language_model.layers[0].mlp.experts
    experts.register_forward_hook(lambda *_: calls.append(1))
    with apply_patches(vl_model, ["scatter_moe"]):
        assert experts.config._experts_implementation == "scatter_moe"
        assert_close(vl_model(packed.ids).logits, expected)
    assert calls


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("has_bias", True, "has biases"),
        ("is_transposed", True, "stores its weights transposed"),
        ("is_concatenated", False, "interleaves gate and up"),
        ("has_gate", False, "has no gate projection"),
        ("has_post_expert_norm", True, "normalises the output"),
        ("act_fn", nn.GELU(), "uses GELU; the op computes SiLU"),
        ("forward", lambda *a: a[0], "has a replaced forward"),
    ],
)
def test_patch_refuses_experts_it_would_get_wrong(model, attribute, value, message):
    experts = model.model.layers[1].mlp.experts
    if attribute == "act_fn":
        experts.act_fn = value
    else:
        vars(experts)[attribute] = value
    with pytest.raises(PatchError, match=rf"layers.1.mlp.experts \(Qwen3MoeExperts\) {message}"):
        apply_patches(model, ["scatter_moe"])


def test_the_registered_name_refuses_unsuitable_experts_too():
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    from monkey_patch.scatter_moe import register

    register()
    config = GptOssConfig(hidden_size=16, intermediate_size=16, num_local_experts=2)
    config._experts_implementation = "scatter_moe"
    with pytest.raises(PatchError, match=r"GptOssExperts has biases"):
        GptOssExperts(config)(torch.zeros(1, 16), torch.zeros(1, 1).long(), torch.zeros(1, 1))


def test_patch_refuses_liger_experts(model):
    swiglu = pytest.importorskip("liger_kernel.transformers.swiglu")
    model.model.layers[1].mlp.experts = swiglu.LigerExperts(model.config)
    with pytest.raises(PatchError, match=r"layers.1.mlp.experts is LigerExperts.*swiglu=False"):
        apply_patches(model, ["scatter_moe"])

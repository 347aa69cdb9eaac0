import re

import pytest
import torch

from monkey_patch import PatchError, apply_patches
from monkey_patch.kernels.varlen_attention import varlen_attention
from monkey_patch.kernels.varlen_attention.reference import varlen_attention_reference
from tests.support.oracle import assert_close

ENDS = torch.tensor([0, 1, 1, 18, 40, 47, 47], dtype=torch.int32)


def _qkv(dtype=torch.float32):
    shapes = ((4, 47, 16), (2, 47, 16), (2, 47, 16))
    return [torch.randn(s, dtype=dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_matches_the_masked_definition(dtype):
    qkv = _qkv(dtype)
    exact = [t.detach().double().requires_grad_() for t in qkv]
    out = varlen_attention(*qkv, ENDS, 22, 0.3)
    truth = varlen_attention_reference(*exact, ENDS, 0.3)
    direction = torch.randn_like(truth)
    out.backward(direction.to(dtype))
    truth.backward(direction)
    assert out.shape == (47, 4, 16)
    assert_close(out, truth, name="out")
    for name, a, e in zip("qkv", qkv, exact, strict=True):
        assert_close(a.grad, e.grad, name=name)


def test_autocast_decides_the_dtype_of_mixed_inputs():
    q, k, v = _qkv()
    with torch.autocast("cpu", torch.bfloat16):
        out = varlen_attention(q, k, v.bfloat16(), ENDS, 22, 0.3)
    assert out.dtype == torch.bfloat16
    assert_close(out, varlen_attention_reference(q.double(), k.double(), v.double(), ENDS, 0.3))


@pytest.mark.parametrize("ends", [[0, 40], [1, 47], [0, 30, 20, 47]])
def test_documents_that_do_not_cover_the_row_are_refused(ends):
    with pytest.raises(ValueError, match=f"cu_seq_lens runs from {ends[0]} to {ends[-1]}"):
        varlen_attention(*_qkv(), torch.tensor(ends, dtype=torch.int32), 47, 1.0)


def _packed_gradients(model, packed):
    logits = model(packed.ids, **packed.isolation, **packed.lengths).logits
    logits.square().mean(dim=-1).sum().backward()
    return logits[0]


def test_packed_equals_separate(model, unpatched, packed):
    apply_patches(model, ["varlen_attention"])
    logits = _packed_gradients(model, packed)
    separate = torch.cat([unpatched(d[None]).logits[0] for d in packed.documents])
    separate.square().mean(dim=-1).sum().backward()
    assert_close(logits, separate, rms=1e-6)
    for (name, a), e in zip(model.named_parameters(), unpatched.parameters(), strict=True):
        assert_close(a.grad, e.grad, name=name, rms=2e-6)


@pytest.mark.parametrize("use_cache", [True, None])
def test_isolation_does_not_depend_on_the_other_keywords(model, unpatched, packed, use_cache):
    """With sdpa these leak between documents in silence: a mask of ones, or positions missing."""
    apply_patches(model, ["varlen_attention"])
    separate = torch.cat([unpatched(d[None]).logits[0] for d in packed.documents])
    out = model(
        packed.ids,
        position_ids=packed.isolation["position_ids"],
        attention_mask=torch.ones_like(packed.ids),
        use_cache=use_cache,
        **packed.lengths,
    )
    assert_close(out.logits[0], separate, rms=1e-6)


def test_without_lengths_positions_isolate_as_in_sdpa(model, unpatched, packed):
    apply_patches(model, ["varlen_attention"])
    out, expected = (m(packed.ids, **packed.isolation).logits for m in (model, unpatched))
    assert_close(out, expected, rms=1e-6)
    whole = unpatched(packed.ids, use_cache=False).logits
    assert (out - whole).abs().max() > 0.01, "the documents were not isolated"


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generates_the_same_as_sdpa_from_a_padded_batch(model, unpatched, packed, cache):
    apply_patches(model, ["varlen_attention"])
    ids = packed.ids[:, :24].reshape(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    options = {
        "attention_mask": mask,
        "max_new_tokens": 6,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    if cache == "static":
        options |= {"cache_implementation": "static", "disable_compile": True}
    out, expected = (m.generate(ids, **options) for m in (model, unpatched))
    assert torch.equal(out.sequences, expected.sequences)
    assert_close(torch.stack(out.logits), torch.stack(expected.logits), rms=1e-6)


def test_several_tokens_on_top_of_a_cache_equal_sdpa(model, unpatched, packed):
    apply_patches(model, ["varlen_attention"])
    outs = []
    for m in (model, unpatched):
        cache = m(packed.ids[:, :20], use_cache=True).past_key_values
        outs.append(m(packed.ids[:, 20:27], past_key_values=cache).logits)
    assert_close(outs[0], outs[1], rms=1e-6)


def test_a_padded_training_batch_equals_sdpa(model, unpatched, packed):
    apply_patches(model, ["varlen_attention"])
    ids = packed.ids[:, :24].reshape(2, 12)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    out, expected = (
        m(ids, attention_mask=mask, use_cache=False).logits for m in (model, unpatched)
    )
    assert_close(out[mask.bool()], expected[mask.bool()], rms=1e-6)


def test_no_mask_is_built_for_a_packed_row(model, packed):
    apply_patches(model, ["varlen_attention"])
    masks = []
    model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda _, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    model(packed.ids, **packed.isolation, **packed.lengths)
    assert [mask.numel() for mask in masks] == [0]


def test_keywords_that_cannot_be_honoured_are_refused(model, packed):
    apply_patches(model, ["varlen_attention"])
    mask = torch.ones_like(packed.ids)
    mask[0, -4:] = 0
    with pytest.raises(ValueError, match="attention_mask that hides tokens"):
        model(packed.ids, attention_mask=mask, use_cache=False, **packed.lengths)
    two_rows = torch.cat([packed.ids, packed.ids])
    with pytest.raises(ValueError, match="cu_seq_lens_q with 2 rows"):
        model(two_rows, use_cache=False, **packed.lengths)
    cache = model(packed.ids[:, :4], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="cu_seq_lens_q with a KV cache"):
        model(packed.ids[:, 4:], past_key_values=cache, **packed.lengths)


def test_patch_serves_qwen3_vl_moe(vl_model, packed):
    separate = torch.cat([vl_model(d[None]).logits[0] for d in packed.documents])
    vision = vl_model.config.vision_config._attn_implementation
    apply_patches(vl_model, ["varlen_attention"])
    out = vl_model(packed.ids, **packed.isolation, **packed.lengths).logits[0]
    assert_close(out, separate, rms=1e-6)
    assert vl_model.config.vision_config._attn_implementation == vision


@pytest.mark.parametrize(
    ("attribute", "value"),
    [("attention_dropout", 0.1), ("sliding_window", 8), ("model_type", "gpt_oss")],
)
def test_patch_refuses_by_name(model, attribute, value):
    setattr(model.config, attribute, value)
    with pytest.raises(PatchError, match=re.escape(str(value))):
        apply_patches(model, ["varlen_attention"])


def test_works_under_activation_checkpointing(model, unpatched, packed):
    apply_patches(model, ["varlen_attention"])
    apply_patches(unpatched, ["varlen_attention"])
    model.train().activation_checkpointing_enable()
    _packed_gradients(model, packed)
    _packed_gradients(unpatched, packed)
    for (name, a), e in zip(model.named_parameters(), unpatched.parameters(), strict=True):
        assert_close(a.grad, e.grad, name=name)


def test_packed_rows_do_not_ask_the_device_about_positions(model, packed, monkeypatch):
    from transformers import masking_utils

    def asked(position_ids):
        raise AssertionError("this waits for the device")

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", asked)
    isolation = {**packed.isolation, "use_cache": False}
    with pytest.raises(AssertionError, match="waits"):
        model(packed.ids, **isolation)
    apply_patches(model, ["varlen_attention"])
    model(packed.ids, **isolation, **packed.lengths)

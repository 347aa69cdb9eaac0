import copy

import pytest
import torch

import monkey_patch
from qwen3_sft.errors import LeakError, ModelError
from qwen3_sft.packing.isolation import check_isolation
from tests.support.training import Documents


@pytest.fixture
def row(tokenizer):
    return Documents(5, len(tokenizer)).documents


@pytest.mark.parametrize("attention", ["torch_varlen", "sdpa", "eager"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_isolated_documents_pass(tiny_moe, tokenizer, row, attention, autocast):
    if attention == "torch_varlen":
        monkey_patch.apply_patches(tiny_moe, ["varlen_attention"])
    else:
        tiny_moe.set_attn_implementation(attention)
    report = check_isolation(tiny_moe, row, 256, tokenizer.pad_token_id, autocast)
    assert report.documents == 5
    assert max(report.worst, report.noise) <= 1e-6
    assert report.loss == pytest.approx(report.loss_replaced, abs=1e-6)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_a_leak_is_refused(tiny_moe, tokenizer, row, autocast):
    # The way it happens for real: an attention mask of ones makes transformers ignore positions.
    original = tiny_moe.model.forward

    def leaking(input_ids, **kwargs):
        return original(input_ids, **kwargs | {"attention_mask": torch.ones_like(input_ids)})

    tiny_moe.model.forward = leaking
    with torch.no_grad():  # random weights attend evenly; make what is attended matter
        for layer in tiny_moe.model.layers:
            layer.self_attn.v_proj.weight *= 20
    with pytest.raises(LeakError, match="--no_packing"):
        check_isolation(tiny_moe, row, 256, tokenizer.pad_token_id, autocast)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named_and_no_leak(tiny_moe, tokenizer, row, bad):
    with torch.no_grad():
        tiny_moe.model.layers[1].self_attn.o_proj.weight[3, 5] = bad
    with pytest.raises(ModelError, match=r"layers\.1\.self_attn\.o_proj\.weight holds 1 values"):
        check_isolation(tiny_moe, row, 256, tokenizer.pad_token_id)


def test_long_documents_are_compared_at_their_beginning(tiny_moe, tokenizer):
    import numpy as np

    rng = np.random.default_rng(0)
    row = []
    for length in (300, 20, 700):
        ids = rng.integers(0, len(tokenizer), length).astype(np.int32)
        row.append((ids, np.ones(length, bool)))
    report = check_isolation(tiny_moe, row, 1024, tokenizer.pad_token_id)
    assert report.documents == 3
    assert report.worst < 1e-5
    assert report.loss == pytest.approx(report.loss_replaced, rel=1e-5)


def test_the_model_is_left_as_it_was(tiny_moe, tokenizer, row):
    tiny_moe.train()
    before = copy.deepcopy(tiny_moe.state_dict())
    check_isolation(tiny_moe, row, 256, tokenizer.pad_token_id)
    assert tiny_moe.training
    assert all(torch.equal(before[k], v) for k, v in tiny_moe.state_dict().items())

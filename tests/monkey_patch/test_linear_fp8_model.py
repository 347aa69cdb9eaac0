"""Linear layers in FP8 inside a model: compiled, checkpointed, chosen by the selection."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch

from monkey_patch import apply_patches, router_statistics
from monkey_patch.linear_fp8 import Fp8Forward
from monkey_patch.linear_fp8 import linear_fp8 as patch_with
from qwen3_sft.model.activation_checkpointing import enable_checkpointing
from tests.monkey_patch.kernels.fp8_cases import Products


@pytest.mark.parametrize("recipe", ["rowwise", "rowwise_with_gw_hp"])
def test_a_decoder_layer_compiles_in_one_piece_to_the_same_bits(make_model, packed, recipe):
    torch.compiler.reset()
    model = make_model()
    apply_patches(model, ["scatter_moe", patch_with(recipe=recipe)])
    compiled = copy.deepcopy(model)
    compiled.model.layers[1].compile(backend="aot_eager", fullgraph=True)
    for m in (model, compiled):
        m(packed.ids, labels=packed.labels, **packed.isolation).loss.backward()
    for (name, a), e in zip(compiled.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(a.grad, e.grad), name


def products_of(model, packed, patches, layers):
    """Products of a step with checkpointing: (in FP8, columns of the second operand) -> number."""
    model = copy.deepcopy(model).train()
    apply_patches(model, patches)
    statistics = router_statistics(model)
    statistics.coefficient = 0.0
    statistics.begin(None, 1, torch.tensor(1.0))
    enable_checkpointing(model, layers)
    loss = model(packed.ids, labels=packed.labels, **packed.isolation).loss
    with Products() as products:
        loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    return Counter((is_fp8, right) for is_fp8, _, right in products.shapes), gradients


def test_checkpointing_keeps_the_projection_that_ends_attention(make_model, packed):
    """It is recognised by its columns, in FP8 as in bfloat16, because a policy sees torchao's
    product from outside; the other three of the layer run again."""
    model = make_model(mlp_only_layers=[], num_key_value_heads=1, head_dim=32)
    patches = ["scatter_moe_recompute", "router_aux_loss", "linear_fp8"]
    kinds = {kind: {kind: 3} for kind in ("none", "full", "selective")}
    found = {k: products_of(model, packed, patches, layers) for k, layers in kinds.items()}
    for _, gradients in found.values():
        assert all(torch.equal(a, b) for a, b in zip(gradients, found["none"][1], strict=True))
    q, k_and_v, o = ((True, (64, 128)), (True, (64, 32)), (True, (128, 64)))
    again = {kind: result[0] - found["none"][0] for kind, result in found.items()}
    fp8_again = {kind: {p: n for p, n in c.items() if p[0]} for kind, c in again.items()}
    assert fp8_again["full"] == {q: 1, k_and_v: 2, o: 1}
    assert fp8_again["selective"] == {q: 1, k_and_v: 2}


def test_the_patch_converts_what_the_selection_says(make_model):
    model = make_model(num_hidden_layers=4, mlp_only_layers=[1])
    with apply_patches(model, [patch_with(keep=["*.k_proj"])]) as applied:
        changed = {
            name for name, m in model.named_modules()
            if isinstance(getattr(vars(m).get("forward"), "__self__", None), Fp8Forward)
        }  # fmt: skip
    attention = {f"model.layers.{i}.self_attn.{p}_proj" for i in (1, 2) for p in "qvo"}
    dense = {f"model.layers.1.mlp.{p}_proj" for p in ("gate", "up", "down")}
    assert changed == attention | dense
    assert applied.counts == {"linear_fp8": 9}

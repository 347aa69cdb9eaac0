"""Selective checkpointing changes no bit, runs the dear operators once, and keeps what it says."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import monkey_patch
from qwen3_sft.demo.model import tiny_config, tiny_model
from qwen3_sft.model.activation_checkpointing import KEPT, enable_checkpointing
from qwen3_sft.packing.collator import PackedCollator

LENGTH, LAYERS, TOP_K = 256, 3, 2
HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 64, 4, 1, 32
MIX = {"full": 1, "selective": 1, "none": 1}
PATCHES = ("scatter_moe_recompute", "varlen_attention", "router_aux_loss", "linear_cross_entropy")


class Watch(TorchDispatchMode):
    """Counts operators and adds up the bytes of results that are still alive, weights apart."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.weights = {p.untyped_storage()._cdata for p in model.parameters()}
        self.counts: Counter[str] = Counter()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.counts[str(func)] += 1
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self.weights:  # a view of a weight
                    self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def alive(self) -> int:
        return sum(size for ref, size in self.storages.values() if not ref.expired())


def make_model(**overrides: Any):
    config = tiny_config(
        512,
        **{
            "hidden_size": HIDDEN, "moe_intermediate_size": 48, "num_hidden_layers": LAYERS,
            "num_experts": 8, "num_experts_per_tok": TOP_K, "head_dim": HEAD_DIM,
            "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        } | overrides,
    )  # fmt: skip
    model = tiny_model(config)
    model.config.use_cache = False
    return model


@pytest.fixture(scope="module")
def model():
    return make_model()


def step(model, kind: str, *, offload: bool = False):
    """Return loss, gradients, operators of forward and backward, bytes kept, router metrics."""
    model = copy.deepcopy(model).train()
    monkey_patch.apply_patches(model, PATCHES)
    statistics = monkey_patch.router_statistics(model)
    statistics.coefficient = 0.01
    layers = MIX if kind == "mixed" else {kind: model.config.num_hidden_layers}
    enable_checkpointing(model, layers, offload=offload)
    rng = np.random.default_rng(0)
    documents = [
        (rng.integers(0, 512, n).astype(np.int32), np.arange(n) >= n // 2) for n in (60, 40, 90)
    ]
    batch = PackedCollator(LENGTH, 0)([documents])
    del batch["stats"]
    statistics.begin(batch.pop("token_mask"), num_rows=1, weight=torch.tensor(1 / 190))
    with Watch(model) as watch:
        loss = model(**batch, num_items_in_batch=95).loss
        kept, forward = watch.alive(), Counter(watch.counts)
        loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return loss.detach(), gradients, forward, watch.counts - forward, kept, statistics.drain()


@pytest.fixture(scope="module")
def steps(model):
    return {kind: step(model, kind) for kind in ("none", "full", "selective", "mixed")}


def test_no_bit_changes(steps):
    loss, gradients, *_, metrics = steps["none"]
    for kind in ("full", "selective", "mixed"):
        other_loss, other, *_, other_metrics = steps[kind]
        assert torch.equal(other_loss, loss)
        differing = [name for name in gradients if not torch.equal(other[name], gradients[name])]
        assert not differing, (kind, differing)
        assert other_metrics == metrics


def test_what_is_kept_is_not_run_again(steps):
    kept = [name for name in steps["selective"][2] if name in KEPT]
    assert len(kept) == 3, "attention, experts and the choice of experts have to be seen"
    for name in kept:
        assert steps["full"][3][name] == steps["full"][2][name], "the test would see it"
        assert steps["selective"][3][name] == 0, name


def test_projections_run_again_except_the_last_of_attention(steps):
    """q, k and v: three products a layer more than without; plain checkpointing runs five more."""
    products = {kind: result[3]["aten.mm.default"] for kind, result in steps.items()}
    # Router and o_proj are products as well; the router's logits are cheap and run again.
    assert products["full"] - products["none"] == 5 * LAYERS
    assert products["selective"] - products["none"] == 4 * LAYERS


def test_bytes_per_token(steps):
    extra = (steps["selective"][4] - steps["full"][4]) / LENGTH / LAYERS
    attention = HEADS * HEAD_DIM * 4 + HEADS * 4
    projection = experts = HIDDEN * 4
    routing = TOP_K * (4 + 4) + TOP_K * (4 + 8)  # two permutations; weights and indices
    assert extra == pytest.approx(attention + projection + experts + routing, rel=0.05)
    assert steps["none"][4] > steps["selective"][4] > steps["full"][4]


def test_policies_by_layer(steps):
    """One layer of each: what runs again is the sum of what each runs again."""
    attention = next(name for name in steps["full"][3] if "attention" in name and name in KEPT)
    assert steps["full"][3][attention] == LAYERS * steps["mixed"][3][attention] > 0
    products = {kind: result[3]["aten.mm.default"] for kind, result in steps.items()}
    assert products["mixed"] - products["none"] == 5 + 4


def test_layers_have_to_add_up(model):
    with pytest.raises(ValueError, match=f"2 of {LAYERS} layers"):
        enable_checkpointing(copy.deepcopy(model), {"full": 2})


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_offload_keeps_inputs_elsewhere(model, steps, kind):
    """The same bits, and each layer's input is copied, as to the host on a GPU."""
    loss, gradients, forward, *_ = step(model, kind, offload=True)
    assert torch.equal(loss, steps["none"][0])
    differing = [n for n, g in gradients.items() if not torch.equal(g, steps["none"][1][n])]
    assert not differing
    assert forward["aten.copy_.default"] - steps[kind][2]["aten.copy_.default"] == LAYERS

"""A packed batch and small models for the patch tests."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from qwen3_sft.demo.model import tiny_config, tiny_model
from tests.support.interpreter import use_kernels

LENGTHS = (1, 17, 5, 30, 11)
VOCAB = 320


@pytest.fixture
def packed():
    """One row of five documents: every keyword a batch has, and the batch of each document."""
    ids = torch.randint(0, VOCAB, (1, sum(LENGTHS)))
    ends = torch.tensor((0, *LENGTHS)).cumsum(0).to(torch.int32)
    labels = ids.clone()
    labels[0, ::3] = -100
    labels[0, ends[:-1].long()] = -100
    return SimpleNamespace(
        ids=ids,
        labels=labels,
        ends=ends,
        documents=ids[0].split(LENGTHS),
        isolation={
            "position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None],
            "use_cache": False,
        },
        lengths={
            "cu_seq_lens_q": ends,
            "cu_seq_lens_k": ends,
            "max_length_q": max(LENGTHS),
            "max_length_k": max(LENGTHS),
        },
        labelled=labelled(labels),
    )


def labelled(labels):
    """The collator's shift: state p predicts the token at p + 1."""
    positions = (labels[0, 1:] >= 0).nonzero()[:, 0]
    return {"label_positions": positions, "label_targets": labels[0, positions + 1]}


@pytest.fixture
def make_model():
    """Builds models with equal weights: a dense first layer, then two mixture-of-experts layers."""

    def make(**overrides):
        sizes = {
            "hidden_size": 64,
            "moe_intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_experts": 8,
            "head_dim": 16,
            "mlp_only_layers": [0],
        }
        return tiny_model(tiny_config(VOCAB, **{**sizes, **overrides}))

    return make


@pytest.fixture
def model(make_model):
    return make_model()


@pytest.fixture
def unpatched(model):
    """An independent copy: its config is not shared, which patches that set a config rely on."""
    return copy.deepcopy(model)


@pytest.fixture
def vl_model():
    """A tiny random Qwen3-VL-MoE; only its text part is run."""
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    text = tiny_config(
        VOCAB, hidden_size=64, moe_intermediate_size=48, num_hidden_layers=2, num_experts=8
    ).to_dict()
    text = {k: v for k, v in text.items() if k not in ("model_type", "rope_parameters")}
    text |= {
        "head_dim": 16,
        "num_experts": 8,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [4, 2, 2],
            "mrope_interleaved": True,
        },
    }
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": 64,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    return Qwen3VLMoeForConditionalGeneration(
        Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    )


@pytest.fixture(params=["plain", pytest.param("kernels", marks=pytest.mark.kernel)])
def backend(request, monkeypatch):
    """The plain torch path, or the Triton kernels in the interpreter."""
    if request.param == "kernels":
        use_kernels(monkeypatch)
    return request.param


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that nobody has written holds NaN, as a byte too, or an index that no tensor has."""

    def poison(function):
        def allocate(*args, **kwargs):
            out = function(*args, **kwargs)
            is_byte = out.dtype == torch.uint8
            value = torch.nan if out.is_floating_point() else 255 if is_byte else -(2**30)
            return out.fill_(value) if out.device.type == "cpu" else out

        return allocate

    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))

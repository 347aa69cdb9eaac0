"""Exports of tiny models for other programs to read, and what they hold."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from qwen3_sft.demo.model import tiny_config, tiny_model
from qwen3_sft.export.export import export_model

THETA = 1e6
ROPES = {
    "default": {"rope_type": "default"},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
}
# Past the original length of yarn, and far enough for another theta to show.
IDS = (np.arange(200) * 7919 % 900).astype(np.int64)


@dataclass(frozen=True)
class Exported:
    """A folder that others read.

    Attributes:
        folder: of the export.
        ids: that it was asked about, (T,) int64.
        logits: what transformers 5 says, (T, V) float32.
        weights: of the live model, by name.
        rope: parameters of the rotary embedding, without theta.
        theta: its base.
        turn_end, other_end: ids of <|im_end|> and of <|endoftext|>, at which the base ended.
    """

    folder: Path
    ids: np.ndarray
    logits: np.ndarray
    weights: dict[str, torch.Tensor]
    rope: dict[str, Any]
    theta: float
    turn_end: int
    other_end: int


@pytest.fixture(scope="session", params=ROPES)
def rope(request):
    """The kind of rotary embedding."""
    return request.param


@pytest.fixture(scope="session", params=["hub", "fused"])
def layout(request):
    """The names of the weights."""
    return request.param


@pytest.fixture(scope="session")
def exported(rope, layout, tokenizer, tmp_path_factory):
    """A Base checkpoint, as if it had been trained on chats, exported."""
    folder = tmp_path_factory.mktemp(f"{rope}_{layout}")
    turn_end, other_end = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    config = tiny_config(
        len(tokenizer), hidden_size=64, moe_intermediate_size=48, num_hidden_layers=2,
        num_experts=8, head_dim=16, eos_token_id=other_end,
        rope_parameters={**ROPES[rope], "rope_theta": THETA},
    )  # fmt: skip
    model = tiny_model(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(4 if "norm" not in name else 1)  # so that attention weighs in
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    export_model(model, folder / "base", folder / "model", turn_ends=["<|im_end|>"], layout=layout)
    np.save(folder / "ids.npy", IDS)
    again = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    with torch.no_grad():
        logits = again(torch.from_numpy(IDS)[None], use_cache=False).logits[0].numpy()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return Exported(folder / "model", IDS, logits, weights, ROPES[rope], THETA, turn_end, other_end)

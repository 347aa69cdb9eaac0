"""Models without memory: what a plan needs to know of one before a byte of it is loaded."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3VLMoeConfig,
)

from qwen3_sft.demo.build import NAME as DEMO
from qwen3_sft.demo.build import VOCAB_SIZE
from qwen3_sft.demo.model import tiny_config
from qwen3_sft.families.known_models import KNOWN_CONFIGS
from qwen3_sft.model.loading import resolve_model
from qwen3_sft.model.trust import load_config


def known_config(name: str) -> PretrainedConfig | None:
    """Return the configuration of a model that is known without network or checkpoint."""
    if name == DEMO:
        return tiny_config(VOCAB_SIZE)
    if name not in KNOWN_CONFIGS or Path(name).is_dir():
        return None
    values = KNOWN_CONFIGS[name]
    return Qwen3VLMoeConfig(**values) if "vision_config" in values else Qwen3MoeConfig(**values)


def model_on_meta(config: PretrainedConfig) -> PreTrainedModel:
    """Build a model without memory: the decoder, and the vision tower of a composite config."""
    is_composite = "vision_config" in config.sub_configs
    kind = AutoModelForImageTextToText if is_composite else AutoModelForCausalLM
    with torch.device("meta"):
        return kind.from_config(config)


def meta_model(name: str, revision: str | None = None) -> PreTrainedModel:
    """Build the model of a known name, a folder or a hub id without its weights.

    Raises:
        ModelError: the model cannot be found or trained.
    """
    if config := known_config(name):
        return model_on_meta(config)
    folder = resolve_model(name, revision)
    return model_on_meta(load_config(folder))

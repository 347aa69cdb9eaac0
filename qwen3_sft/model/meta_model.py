"""Models without memory: what a plan needs to know of one before a byte of it is loaded."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from qwen3_sft.demo.build import NAME as DEMO
from qwen3_sft.demo.build import VOCAB_SIZE
from qwen3_sft.demo.model import tiny_config
from qwen3_sft.families.family import families, require
from qwen3_sft.model.loading import auto_class, resolve_model
from qwen3_sft.model.trust import load_config


def known_config(name: str) -> PretrainedConfig | None:
    """Return the configuration of a model that is known without network or checkpoint."""
    if name == DEMO:
        return tiny_config(VOCAB_SIZE)
    if Path(name).is_dir():
        return None
    for family in families():
        if values := family.known_configs.get(name):
            return AutoConfig.for_model(family.model_types[0], **values)
    return None


def model_on_meta(config: PretrainedConfig) -> PreTrainedModel:
    """Build a model without memory: the decoder, and the vision tower of a composite config.

    Raises:
        ModelError: no family has its `model_type`.
    """
    with torch.device("meta"):
        return auto_class(config).from_config(config)


def meta_model(name: str, revision: str | None = None) -> PreTrainedModel:
    """Build the model of a known name, a folder or a hub id without its weights.

    Raises:
        ModelError: the model cannot be found or trained.
    """
    if config := known_config(name):
        require("train", config, name)
        return model_on_meta(config)
    folder = resolve_model(name, revision)
    return model_on_meta(load_config(folder))

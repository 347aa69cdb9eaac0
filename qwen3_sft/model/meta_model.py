"""Models without memory: what a plan needs to know of one before a byte of it is loaded."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from qwen3_sft.demo.build import NAME as DEMO
from qwen3_sft.demo.build import VOCAB_SIZE
from qwen3_sft.demo.model import tiny_config
from qwen3_sft.errors import ModelError
from qwen3_sft.families.family import families, require
from qwen3_sft.model.config_file import CONFIG
from qwen3_sft.model.loading import auto_class, resolve_config
from qwen3_sft.model.trust import WRONG_VALUES, load_config
from qwen3_sft.model.vocabulary import check_special_ids


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
        ModelError: the model cannot be found, built or trained.
    """
    if config := known_config(name):
        require("train", config, name)
        return model_on_meta(config)
    folder = resolve_config(name, revision)
    config = load_config(folder)
    check_special_ids(config, folder)
    try:
        return model_on_meta(config)
    except WRONG_VALUES as error:
        raise ModelError(
            f"{folder / CONFIG}: no model can be built from it ({type(error).__name__}: {error})"
        ) from error

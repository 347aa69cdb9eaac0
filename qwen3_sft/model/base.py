"""A base model before anything of it is loaded: all that its folder tells, checked at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qwen3_sft.model.base_files import read_headers
from qwen3_sft.model.config_file import check_generation, read_config
from qwen3_sft.model.loading import load_tokenizer
from qwen3_sft.model.meta_model import meta_model
from qwen3_sft.model.quantised import refuse_quantised_headers
from qwen3_sft.model.vocabulary import check_vocabulary
from qwen3_sft.model.weights_fit import check_fit


@dataclass(frozen=True)
class Base:
    """What a run begins from.

    Attributes:
        folder: with config.json, weights and tokenizer.
        model: on the meta device.
        tokenizer: of the model.
    """

    folder: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def checked_base(folder: Path) -> Base:
    """Return a base model after reading all that is small: config, headers, tokenizer.

    Every process does so by itself, which takes it well under a second for 16 shards.

    Raises:
        ModelError: a file is missing or damaged, or they do not fit one another.
    """
    model = meta_model(str(folder))
    headers = read_headers(folder)
    refuse_quantised_headers(headers, read_config(folder), str(folder))
    check_fit(model, headers, folder)
    tokenizer = load_tokenizer(folder)
    check_vocabulary(tokenizer, model.config, folder)
    check_generation(folder)
    return Base(folder, model, tokenizer)

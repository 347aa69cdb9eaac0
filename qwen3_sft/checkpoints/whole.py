"""Read a checkpoint of any engine as one whole model, in one process without a GPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from qwen3_sft.checkpoints.manifest import verify
from qwen3_sft.checkpoints.sharded import WEIGHTS, load_sharded_weights
from qwen3_sft.checkpoints.trust import refuse_foreign_code
from qwen3_sft.errors import CheckpointError
from qwen3_sft.model.loading import auto_class, load_strict
from qwen3_sft.model.trust import load_config


def load_checkpoint(folder: Path, *, trusted: bool = False) -> PreTrainedModel:
    """Return the model of a verified checkpoint, on the CPU.

    Memory: one copy of the weights, and for DeepSpeed's float32 shards a second one.

    Args:
        folder: the checkpoint.
        trusted: load it although loading might run code (`--trust_checkpoint`).

    Raises:
        CheckpointError: damaged, holding what might run code, or written by DeepSpeed, which is not
            installed.
        ModelError: the files do not fit the model.
    """
    layout = verify(folder).get("layout", "whole")
    refuse_foreign_code(folder, trusted=trusted)
    if layout == "zero":
        return _load_zero(folder)
    if layout == "dtensor" and (folder / WEIGHTS).is_dir():
        model = _empty_model(folder)
        load_sharded_weights(model, folder)
        return model
    return load_strict(folder)


def _empty_model(folder: Path) -> Any:
    config = load_config(folder)
    with no_init_weights():
        return auto_class(config).from_config(config)


def _load_zero(folder: Path) -> PreTrainedModel:
    if importlib.util.find_spec("deepspeed") is None:
        raise CheckpointError(f"{folder} was saved by DeepSpeed; to read it: pip install deepspeed")
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    model = _empty_model(folder)
    saved: Any = get_fp32_state_dict_from_zero_checkpoint(str(folder))
    load_whole_state(model, saved, folder)
    return model


def load_weights(model: PreTrainedModel, folder: Path) -> None:
    """Put a saved checkpoint's weights into a live (patched) model, strictly.

    The hub's per-expert names are merged into the live fused tensors by the same conversion that
    `from_pretrained` uses.

    Raises:
        ModelError: the files miss a weight, or have one too many.
        CheckpointError: the live model has other parameters than the files.
    """
    saved = load_strict(folder, dtype=next(model.parameters()).dtype).state_dict()
    load_whole_state(model, saved, folder)


def load_whole_state(model: PreTrainedModel, saved: dict[str, Tensor], folder: Path) -> None:
    """Copy the whole tensors read from `folder` into a model that must have the same names.

    Raises:
        CheckpointError: it has others.
    """
    live = model.state_dict()
    if saved.keys() != live.keys():
        differing = sorted(saved.keys() ^ live.keys())
        raise CheckpointError(f"{folder}: the live model differs in {', '.join(differing[:5])}")
    model.load_state_dict(saved, strict=True)

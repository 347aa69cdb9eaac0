"""The JSON files beside the weights say what was trained: which tokens end a turn.

A base model's files are right for the base model. Fine-tuned on conversations it ends its turns
with `<|im_end|>`, which a Base checkpoint does not stop at; so the tokens that the labels end in
are written where readers look for them, and of the rest only names of keys change.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from qwen3_sft.chat.templates import IM_END, IM_START
from qwen3_sft.checkpoints.config_keys import with_older_keys, with_older_tokenizer_keys
from qwen3_sft.errors import CheckpointError

logger = logging.getLogger(__name__)

# Qwen3's own tokens that stand for nothing in a text; the first is what its releases pad with.
_PADS = ("<|endoftext|>", "<|fim_pad|>", "<|vision_pad|>")
GENERATION, CONFIG = "generation_config.json", "config.json"
_TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json")


def complete_metadata(
    folder: Path, tokenizer: PreTrainedTokenizerBase, turn_ends: Sequence[str]
) -> None:
    """Put the tokens that end a labelled turn, and the keys of other readers, into a model's files.

    `config.json` gets the trained end tokens, as Qwen's releases have it; `generation_config.json`
    these first, then whatever else the base stopped at. The tokenizer's end token is the first.
    The pad token stays unless there is none or it is one of them.

    Args:
        folder: with config.json, generation_config.json and the tokenizer's files.
        tokenizer: that of the folder.
        turn_ends: the most important first; without one, end and pad tokens stay.

    Raises:
        CheckpointError: one is no token of the tokenizer.
    """
    if turn_ends:
        _write_ends(folder, tokenizer, turn_ends)
    _change(folder / CONFIG, with_older_keys)
    _change(folder / _TOKENIZER_FILES[0], with_older_tokenizer_keys)


def write_configs(model: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write config.json and generation_config.json as of a model that is loaded to be used.

    FSDP2 puts its name before the model's class. Training switches the cache off. Settings of
    generation are written as they are: `save_pretrained` refuses some that Qwen has released.

    Args:
        model: unwrapped, held by any engine.
        folder: there.
        dtype: of the weights beside them.
    """
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__.removeprefix("FSDP")]
    config.dtype = str(dtype).removeprefix("torch.")
    config.get_text_config().use_cache = True
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.to_json_file(folder / GENERATION)


def turn_ends_of(manifest: dict[str, Any], tokenizer: Any, folder: Path) -> list[str]:
    """Return the tokens that ended a labelled turn in the run that saved a checkpoint.

    Args:
        manifest: of the checkpoint. Those of earlier versions do not say: then it is what ends a
            turn in the tokenizer's chat template, or without one the tokenizer's end token.
        tokenizer: of the checkpoint.
        folder: the checkpoint, for the log.
    """
    if "turn_ends" in manifest:
        return manifest["turn_ends"]
    template = str(tokenizer.chat_template or "")
    end = IM_END if IM_START in template else str(tokenizer.eos_token)
    logger.warning(
        "%s does not say which token ended the labelled turns, it was saved by an earlier version: "
        "%s is taken, from the tokenizer's %s", folder, end,
        "chat template" if IM_START in template else "end token",
    )  # fmt: skip
    return [end]


def token_id(tokenizer: PreTrainedTokenizerBase, token: str, folder: Path) -> int:
    """Return the id of an added token.

    Raises:
        CheckpointError: the tokenizer of `folder` has none of this name.
    """
    found = tokenizer.get_added_vocab().get(token)
    if found is None:
        raise CheckpointError(f"{folder}: its tokenizer has no token {token}, which ended turns")
    return found


def as_ids(value: Any) -> list[int]:
    """Return the end tokens of a config: it has one, several or none."""
    if value is None:
        return []
    return [value] if isinstance(value, int) else list(value)


def _write_ends(folder: Path, tokenizer: Any, turn_ends: Sequence[str]) -> None:
    trained = [token_id(tokenizer, token, folder) for token in turn_ends]
    pad = _pad_token(tokenizer, turn_ends)
    pad_id = tokenizer.convert_tokens_to_ids(pad)
    former = [*as_ids(_read(folder / GENERATION).get("eos_token_id"))]
    former += as_ids(_read(folder / CONFIG).get("eos_token_id"))
    former += as_ids(tokenizer.eos_token_id)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    kept = [i for i in dict.fromkeys(former) if i in special and i not in trained]

    def generation(content: dict[str, Any]) -> dict[str, Any]:
        return content | {"eos_token_id": _one_or_all([*trained, *kept]), "pad_token_id": pad_id}

    def config(content: dict[str, Any]) -> dict[str, Any]:
        told = {key: config(value) for key, value in content.items() if key == "text_config"}
        if content.get("pad_token_id") in trained:
            told["pad_token_id"] = pad_id
        return content | told | {"eos_token_id": _one_or_all(trained)}

    _change(folder / GENERATION, generation)
    _change(folder / CONFIG, config)
    for name in _TOKENIZER_FILES:
        _change(folder / name, lambda content: _with_tokens(content, eos=turn_ends[0], pad=pad))


def _pad_token(tokenizer: Any, turn_ends: Sequence[str]) -> str:
    """Return the tokenizer's own pad token, or one that does not end a trained turn."""
    there = tokenizer.get_added_vocab()
    choices = (tokenizer.pad_token, *_PADS)
    free = (token for token in choices if token in there and token not in turn_ends)
    return next(free, tokenizer.pad_token)


def _with_tokens(content: dict[str, Any], **tokens: str) -> dict[str, Any]:
    """Name a tokenizer's end and pad token, in the form in which the file has them."""
    named = {}
    for kind, token in tokens.items():
        former = content.get(f"{kind}_token")
        is_object = isinstance(former, dict)
        named[f"{kind}_token"] = {**former, "content": token} if is_object else token
    return content | named


def _one_or_all(ids: list[int]) -> int | list[int]:
    return ids[0] if len(ids) == 1 else ids


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _change(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Write a JSON file with what `change` makes of it; a file that needs none stays byte by byte.

    A file that is not there is not made.
    """
    before = _read(path)
    if path.is_file() and (after := change(before)) != before:
        path.write_text(json.dumps(after, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

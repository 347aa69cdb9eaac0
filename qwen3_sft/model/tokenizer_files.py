"""Read a folder's tokenizer; of files that make none, say which one is at fault."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qwen3_sft.errors import ModelError, told_as
from qwen3_sft.model.base_files import check_file

_JSON_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json",
)  # fmt: skip
# What a checkpoint folder holds beside the weights, and what an export copies unchanged.
FILES = (*_JSON_FILES, "merges.txt", "chat_template.jinja")
_HINT = "copy the tokenizer's files from the released model"


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Read a tokenizer as transformers does, without any code of the folder's.

    Raises:
        ModelError: there is none, or a file of it is damaged; the message names the file.
    """
    found = [path for path in (folder / name for name in FILES) if _is_there(path)]
    if not {path.name for path in found} & {"tokenizer.json", "vocab.json"}:
        raise ModelError(f"{folder}: has no tokenizer (tokenizer.json); {_HINT}")
    for path in found:
        _check_file(path)
    # tokenizers 0.23 raises nothing narrower than Exception, transformers 5 whatever comes up.
    with told_as(ModelError, f"{folder}: its tokenizer cannot be loaded ({_HINT})", Exception):
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    _check_template(tokenizer.chat_template, folder)
    return tokenizer


def _is_there(path: Path) -> bool:
    return path.exists() or path.is_symlink()  # to what is gone, which is told


def _check_file(path: Path) -> None:
    check_file(path)
    with told_as(ModelError, f"{path}: cannot be read ({_HINT})", OSError, ValueError):
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.name in _JSON_FILES else {}
    if not isinstance(content, dict):
        raise ModelError(f"{path}: must hold an object, found a {type(content).__name__}; {_HINT}")


def _check_template(template: Any, folder: Path) -> None:
    texts = [*template.values()] if isinstance(template, dict) else [template]
    for text in texts:
        if text is not None and not isinstance(text, str):
            raise ModelError(
                f"{folder}: its chat_template is a {type(text).__name__}, not a text; {_HINT}"
            )

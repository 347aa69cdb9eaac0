"""Byte-level BPE by `tiktoken`, which gives the ids of `tokenizers` several times faster.

Not every tokenizer can be said in its terms: a list of tokens in the order of their merges and one
pattern. What differs is refused here; what the files do not tell is found by comparison on the
run's own rows (`chat/ids_check.py`). Texts in which the two libraries may disagree are told apart,
so that they go through `tokenizers`.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache
from typing import Any

import tiktoken

# Qwen2's, Qwen3's and Qwen2.5's; both libraries read it alike (tests/data/test_fast_bpe.py).
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE_TOKENIZERS = [
    {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False},
    {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
]
_BPE = {
    "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
    "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
}  # fmt: skip
_LONGEST_BLANK = 4096  # of a run of whitespace; tiktoken's regex engine fails at some 250,000
_BLANK = re.compile(rf"\s{{{_LONGEST_BLANK}}}")


class FastBpe:
    """A tokenizer without its added tokens; pickles.

    Attributes:
        encoding: whose ids are ranks.
        ids: of the tokenizer, by rank; None where they are the ranks.
    """

    def __init__(self, ranks: dict[bytes, int], ids: list[int] | None) -> None:
        self.encoding = tiktoken.Encoding(
            "qwen3_sft", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={}
        )
        self.ids = ids
        self._assigned: set[str] = set()

    def encode(self, text: str) -> list[int] | None:
        """Return the ids of a text; None for one that `tokenizers` has to encode."""
        if not text.isascii():
            if not self._is_known(text):
                return None
            text = unicodedata.normalize("NFC", text)
        if len(text) >= _LONGEST_BLANK and _BLANK.search(text):
            return None
        ranks = self.encoding.encode_ordinary(text)
        return ranks if self.ids is None else [self.ids[rank] for rank in ranks]

    def _is_known(self, text: str) -> bool:
        """Whether all characters are in the Unicode of this Python.

        Only of these is it certain that a library of a later Unicode treats them alike. A lone
        surrogate is none.
        """
        new = set(text) - self._assigned
        if any(unicodedata.category(character) in ("Cn", "Cs") for character in new):
            return False
        self._assigned |= new
        return True


def fast_bpe(spec: dict[str, Any]) -> FastBpe | str:
    """Return what encodes as a tokenizer does, or why there is none.

    Args:
        spec: its `tokenizer.json`, as `tokenizers` writes it.
    """
    model, pre_tokenizer = spec["model"], spec["pre_tokenizer"] or {}
    if spec["normalizer"] != {"type": "NFC"}:
        return "its normalizer is not NFC"
    if [_without_offsets(p) for p in pre_tokenizer.get("pretokenizers", ())] != _PRE_TOKENIZERS:
        return "its pre-tokenizer is not Qwen3's"
    if {name: model.get(name) or None for name in _BPE} != {k: v or None for k, v in _BPE.items()}:
        return "its model is not plain byte-level BPE"
    vocabulary, merges = model["vocab"], model["merges"]
    names = [*_alphabet(), *(left + right for left, right in merges)]
    ids = [vocabulary.get(name) for name in names]
    if None in ids or len(set(names)) < len(names):
        return "a byte is not in its vocabulary, or two merges make one token"
    byte_of = {ord(letter): byte for byte, letter in enumerate(_alphabet())}
    in_bytes = [name.translate(byte_of).encode("latin-1") for name in names]
    first = len(byte_of)
    if sorted(ids[:first]) == [*range(first)] and ids[first:] == [*range(first, len(ids))]:
        return FastBpe(dict(zip(in_bytes, ids, strict=True)), None)
    return FastBpe({token: rank for rank, token in enumerate(in_bytes)}, ids)


def _without_offsets(pre_tokenizer: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in pre_tokenizer.items() if name != "trim_offsets"}


@cache
def _alphabet() -> str:
    """Return the letters of byte-level BPE, one per byte: GPT-2's, printable ones as they are."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return "".join(chr(byte) if byte in kept else chr(next(others)) for byte in range(256))

"""Rendered pieces become token ids and a mask; content has no way to forge a control token.

A tokenizer finds its added tokens in any text, also in what a user wrote. Here plain pieces go
through a copy of it without Qwen's control tokens, which are put in by id. All other text gets
exactly the ids of the tokenizer itself, and so do tokens that somebody has added to it: at
inference they stand for themselves too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from qwen3_sft.chat.control_tokens import QWEN3_CONTROL_TOKENS
from qwen3_sft.chat.pieces import Rendered
from qwen3_sft.chat.templates import CONTROL_TOKENS
from qwen3_sft.chat.turn_ends import TurnEnds
from qwen3_sft.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Of an added token in a tokenizer.json: its text, and what decides where it is found.
_FLAGS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")

Encoded = tuple[np.ndarray, np.ndarray]  # input_ids (T,) int32, trained (T,) bool


class Encoder:
    """Encodes rendered samples; pickles, so that worker processes get a copy.

    Attributes:
        eos_token: the tokenizer's end token, for `render_plain`.
        turn_ends: finds the tokens that end what is labelled.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Take over a fast tokenizer.

        Raises:
            ModelError: it is not a fast tokenizer with Qwen3's control tokens.
        """
        from tokenizers import AddedToken, Tokenizer

        if not tokenizer.is_fast:
            raise ModelError(
                f"{type(tokenizer).__name__} has no fast backend; the model folder needs a "
                "tokenizer.json"
            )
        spec = json.loads(tokenizer.backend_tokenizer.to_str())
        self._ids: dict[str, int] = {t["content"]: t["id"] for t in spec["added_tokens"]}
        self.eos_token = str(tokenizer.eos_token)
        missing = [token for token in (*CONTROL_TOKENS, self.eos_token) if token not in self._ids]
        if missing:
            raise ModelError(
                f"{tokenizer.name_or_path or 'the tokenizer'}: no control token "
                f"{' '.join(missing)}: it is not Qwen3's; use "
                "the tokenizer files of a Qwen3 model"
            )
        special = [t["content"] for t in spec["added_tokens"] if t["special"]]
        protected = {*QWEN3_CONTROL_TOKENS, self.eos_token}
        own = [token for token in spec["added_tokens"] if token["content"] not in protected]
        spec.update(added_tokens=[], truncation=None, padding=None, post_processor=None)
        self._plain = Tokenizer.from_str(json.dumps(spec))
        newline = self._plain.encode("\n", add_special_tokens=False).ids
        self.turn_ends = TurnEnds(self._ids, special, self.eos_token, newline)
        # Without the control tokens before them they get other ids.
        self._plain.add_tokens([AddedToken(**{k: token[k] for k in _FLAGS}) for token in own])
        self._own_ids = {
            self._plain.token_to_id(token["content"]): token["id"]
            for token in own
            if self._plain.token_to_id(token["content"]) != token["id"]
        }

    def encode(self, rendered: Rendered) -> Encoded:
        """Return input_ids (T,) int32 and trained (T,) bool of one sample."""
        return self.encode_batch([rendered])[0]

    def encode_batch(self, batch: Sequence[Rendered]) -> list[Encoded]:
        """Encode several samples with one call of the tokenizer, which is faster."""
        pieces = chain.from_iterable(rendered.pieces for rendered in batch)
        texts = list({piece.text: None for piece in pieces if not piece.control})
        encodings = self._plain.encode_batch_fast(texts, add_special_tokens=False)
        ids = {text: self._as_own(e.ids) for text, e in zip(texts, encodings, strict=True)}
        return [self._assemble(rendered, ids) for rendered in batch]

    def _as_own(self, ids: list[int]) -> list[int]:
        """Return the tokenizer's ids for those of the copy."""
        return [self._own_ids.get(i, i) for i in ids] if self._own_ids else ids

    def _assemble(self, rendered: Rendered, plain_ids: dict[str, list[int]]) -> Encoded:
        ids: list[int] = []
        trained: list[bool] = []
        for piece in rendered.pieces:
            new = [self._ids[piece.text]] if piece.control else plain_ids[piece.text]
            ids += new
            trained += [piece.trained] * len(new)
        return np.array(ids, np.int32), np.array(trained, bool)

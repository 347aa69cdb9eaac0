"""Rendered pieces become token ids and a mask; content has no way to forge a control token.

A tokenizer finds its added tokens in any text, also in what a user wrote. Here plain pieces go
through a copy of it without Qwen's control tokens, which are put in by id. All other text gets
exactly the ids of the tokenizer itself, and so do tokens that somebody has added to it: at
inference they stand for themselves too.
"""

from __future__ import annotations

import json
import re
import unicodedata
from array import array
from collections.abc import Sequence
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen3_sft.chat.control_tokens import QWEN3_CONTROL_TOKENS
from qwen3_sft.chat.fast_bpe import FastBpe, fast_bpe
from qwen3_sft.chat.pieces import Rendered, Segment
from qwen3_sft.chat.templates import CONTROL_TOKENS
from qwen3_sft.chat.turn_ends import TurnEnds
from qwen3_sft.errors import ModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

# Of an added token in a tokenizer.json: its text, and what decides where it is found.
_FLAGS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")

Proof = tuple[str, list[int]]  # a text in which no control token is meant, and its ids
Encoded = tuple[np.ndarray, np.ndarray]  # input_ids (T,) int32, trained (T,) bool


class Encoder:
    """Encodes rendered samples; pickles, so that worker processes get a copy.

    Attributes:
        eos_token: the tokenizer's end token, for `render_plain`.
        turn_ends: finds the tokens that end what is labelled.
        reference: `tokenizers`, which decides what is right.
        why_slow: why `tiktoken` is not used; None where it is.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, fast: bool = True) -> None:
        """Take over a fast tokenizer.

        Args:
            tokenizer: of the model.
            fast: encode by `tiktoken` what it can encode.

        Raises:
            ModelError: it is not a fast tokenizer with Qwen3's control tokens.
        """
        if not tokenizer.is_fast:
            raise ModelError(
                f"{type(tokenizer).__name__} has no fast backend; the model folder needs a "
                "tokenizer.json"
            )
        text = tokenizer.backend_tokenizer.to_str()
        spec = json.loads(text)
        self._ids: dict[str, int] = {t["content"]: t["id"] for t in spec["added_tokens"]}
        self._controls = {token: [i] for token, i in self._ids.items()}
        self.eos_token = str(tokenizer.eos_token)
        missing = [token for token in (*CONTROL_TOKENS, self.eos_token) if token not in self._ids]
        if missing:
            raise ModelError(
                f"{tokenizer.name_or_path or 'the tokenizer'}: no control token "
                f"{' '.join(missing)}: it is not Qwen3's; use "
                "the tokenizer files of a Qwen3 model"
            )
        protected = frozenset({*QWEN3_CONTROL_TOKENS, self.eos_token})
        self.reference = WithoutControlTokens(text, protected)
        bpe = fast_bpe(spec) if fast else "not wanted"
        self._fast, self.why_slow = (None, bpe) if isinstance(bpe, str) else (bpe, None)
        self._own = _any_of([name for name in self._ids if name not in protected])
        special = [t["content"] for t in spec["added_tokens"] if t["special"]]
        newline, *roles = self.encode_texts(["\n", *(f"{role}\n" for role in _ROLES)])
        self._roles = dict(zip(_ROLES, roles, strict=True))
        self.turn_ends = TurnEnds(self._ids, special, self.eos_token, newline)

    def encode(self, rendered: Rendered) -> Encoded:
        """Return input_ids (T,) int32 and trained (T,) bool of one sample."""
        return self.encode_batch([rendered])[0]

    def encode_batch(self, batch: Sequence[Rendered]) -> list[Encoded]:
        """Encode several samples at once, which is faster: what they share is encoded once."""
        segments = {id(segment): segment for rendered in batch for segment in rendered.segments}
        pieces = chain.from_iterable(segments.values())
        texts = list({piece.text: None for piece in pieces if not piece.control})
        ids = dict(zip(texts, self.encode_texts(texts), strict=True))
        parts = {key: self._assemble(segment, ids) for key, segment in segments.items()}
        encoded = []
        for rendered in batch:
            own = [parts[id(segment)] for segment in rendered.segments]
            encoded.append(
                (
                    np.frombuffer(b"".join([ids for ids, _ in own]), np.int32),
                    np.frombuffer(b"".join([trained for _, trained in own]), bool),
                )
            )
        return encoded

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of texts in which no control token is meant."""
        if self._fast is None:
            return self.reference.encode_texts(texts)
        bodies: dict[str, list[int] | None] = {}
        found = [self._encode_fast(self._fast, text, bodies) for text in texts]
        left = [text for text, ids in zip(texts, found, strict=True) if ids is None]
        rest = iter(self.reference.encode_texts(left) if left else ())
        return [next(rest) if ids is None else ids for ids in found]

    def _encode_fast(
        self, fast: FastBpe, text: str, bodies: dict[str, list[int] | None]
    ) -> list[int] | None:
        """Return the ids of a text, None if `tokenizers` has to encode it.

        Args:
            fast: encodes.
            text: of a piece.
            bodies: ids of texts that the pattern parts from a role before them. An answer stands
                beside its role where it is history, and alone where it is learned.
        """
        if self._own is not None:
            forms = (text, unicodedata.normalize("NFC", text))
            return None if any(map(self._own.search, forms)) else fast.encode(text)
        head, newline, body = text.partition("\n")
        if head not in _ROLES or not newline or not body or body[0].isspace():
            head, body = "", text
        if body not in bodies:
            bodies[body] = fast.encode(body)
        ids = bodies[body]
        return ids if not head or ids is None else self._roles[head] + ids

    def _assemble(self, segment: Segment, plain_ids: dict[str, list[int]]) -> tuple[bytes, bytes]:
        """Return ids and labels of a segment as the bytes of arrays."""
        ids: list[int] = []
        trained: list[bytes] = []
        for text, is_trained, is_control in segment:
            new = self._controls[text] if is_control else plain_ids[text]
            ids += new
            trained.append(_LABELS[is_trained] * len(new))
        return array("i", ids).tobytes(), b"".join(trained)


_LABELS = (b"\0", b"\1")
_ROLES = ("system", "user", "assistant")


class WithoutControlTokens:
    """A copy of a tokenizer that finds no control token in a text; made when it is needed."""

    def __init__(self, spec: str, protected: frozenset[str]) -> None:
        """Keep the text of a `tokenizer.json`, and the added tokens that texts cannot spell."""
        self._spec = spec
        self._protected = protected

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokenizer's ids of each text."""
        copy, own_ids = self._made
        encodings = copy.encode_batch_fast(list(texts), add_special_tokens=False)
        if own_ids:
            return [[own_ids.get(i, i) for i in encoding.ids] for encoding in encodings]
        return [encoding.ids for encoding in encodings]

    def __getstate__(self) -> dict[str, Any]:
        return {"_spec": self._spec, "_protected": self._protected}

    @cached_property
    def _made(self) -> tuple[Tokenizer, dict[int, int]]:
        """The copy, and the tokenizer's ids where the copy's differ."""
        from tokenizers import AddedToken, Tokenizer

        spec = json.loads(self._spec)
        own = [t for t in spec["added_tokens"] if t["content"] not in self._protected]
        spec.update(added_tokens=[], truncation=None, padding=None, post_processor=None)
        copy = Tokenizer.from_str(json.dumps(spec))
        # Without the control tokens before them they get other ids.
        copy.add_tokens([AddedToken(**{k: token[k] for k in _FLAGS}) for token in own])
        copied = [(copy.token_to_id(token["content"]), token["id"]) for token in own]
        return copy, {i: own_id for i, own_id in copied if i is not None and i != own_id}


def _any_of(tokens: Sequence[str]) -> re.Pattern[str] | None:
    """Return what finds added tokens in a text, also where they are looked for in its NFC."""
    spelled = {form for token in tokens for form in (token, unicodedata.normalize("NFC", token))}
    return re.compile("|".join(map(re.escape, sorted(spelled)))) if spelled else None

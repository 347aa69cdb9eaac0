"""Ids of the run's own texts are compared with those of the tokenizer itself."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

from qwen3_sft.chat.encoding import Encoder, Proof

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class IdsCheck:
    """Compares what `tiktoken` made of texts with what `tokenizers` makes of them.

    Attributes:
        has_failed: some ids differ, so that none of them can be used.
    """

    def __init__(self, encoder: Encoder, tokenizer: PreTrainedTokenizerBase) -> None:
        self.has_failed = False
        self._reference = encoder.reference
        self._is_needed = encoder.why_slow is None
        self._backend = tokenizer.backend_tokenizer
        self._is_bare = self._backend.truncation is None and self._backend.padding is None
        self._added = tuple(tokenizer.get_added_vocab())
        self._seen: set[str] = set()

    def __call__(self, proof: Iterable[Proof]) -> bool:
        """Whether the ids are right."""
        new = [(text, ids) for text, ids in proof if text not in self._seen]
        if not self._is_needed or not new:
            return True
        self._seen.update(text for text, _ in new if len(text) < _SHORT)
        for (text, ids), right in zip(new, self._right([text for text, _ in new]), strict=True):
            if ids != right:
                logger.warning(
                    "tiktoken and the tokenizer make different tokens of %r: all data is tokenised "
                    "by `tokenizers`, which takes longer", text[:200],
                )  # fmt: skip
                self.has_failed = True
                return False
        return True

    def _right(self, texts: list[str]) -> list[list[int]]:
        # The copy takes a second to make; where no added token is spelled it is not needed.
        if self._is_bare and not any(token in text for text in texts for token in self._added):
            encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
            return [encoding.ids for encoding in encodings]
        return self._reference.encode_texts(texts)


_SHORT = 64  # characters of a text that is worth remembering, such as "assistant\n"

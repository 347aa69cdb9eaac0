"""Text rendered by our code is compared with the tokenizer's own chat template.

A template that differs may do so in one branch only, so rows are chosen by what they have
(`chat/features.py`), wherever they stand: some of each combination that the data has.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

from qwen3_sft.chat.samples import Conversation
from qwen3_sft.chat.self_check import Comparison, comparisons, self_check
from qwen3_sft.chat.template_process import is_shipped
from qwen3_sft.data.choose_rows import ChosenRow, RowChooser
from qwen3_sft.data.formats import parse_row
from qwen3_sft.data.raw_rows import RawRow
from qwen3_sft.data.tokenize_rows import TokenizeOptions
from qwen3_sft.data.tokenized_rows import PackedRows, TokenizedRows
from qwen3_sft.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Chunk = TypeVar("Chunk", TokenizedRows, PackedRows)

logger = logging.getLogger(__name__)


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the template that a tokenizer uses where none is named."""
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


class TemplateCheck:
    """Compares rows of every kind with what the tokenizer's template renders at inference."""

    def __init__(
        self, options: TokenizeOptions, tokenizer: PreTrainedTokenizerBase, *, is_explicit: bool
    ) -> None:
        """Check what `options.chat_format` renders.

        Args:
            options: how rows are rendered.
            tokenizer: with its chat template.
            is_explicit: the format was chosen by `--chat_format`; a difference is a warning.
        """
        self.options = options
        self.tokenizer = tokenizer
        self.is_explicit = is_explicit
        self._chooser = RowChooser()
        self._waiting: list[RawRow] = []
        self._is_told = False

    def __call__(self, chunks: Iterable[Chunk]) -> Iterator[Chunk]:
        """Pass tokenised rows on and check them: all have been when this ends.

        A template of unknown origin gets a process of its own, which takes seconds to start, so
        rows wait for each other: until the first, second, fourth, ... chunk has passed.

        Raises:
            DataError: a text differs, and the format was not chosen by `--chat_format`.
        """
        for number, chunk in enumerate(chunks, 1):
            self._choose(chunk.chosen)
            yield chunk
            if number & (number - 1) == 0:
                self._check()
        self._check()

    def _choose(self, chosen: Iterable[ChosenRow]) -> None:
        self._waiting += [row.raw for row in chosen if self._chooser.wants(row.features)]

    def _check(self) -> None:
        rows, self._waiting = self._waiting, []
        chat_format = self.options.chat_format
        if self._is_told or not rows or chat_format is None or not chat_template(self.tokenizer):
            return
        compared = [ask for row in rows for ask in _comparisons(row, chat_format)]
        try:
            is_apart = not is_shipped(self.tokenizer.chat_template)
            self_check(compared, self.tokenizer, chat_format, is_apart=is_apart)
        except ValueError as error:
            if not self.is_explicit:
                name = self.tokenizer.name_or_path or "tokenizer"
                raise DataError(f"{name}: {error}") from error
            logger.warning("training on %s as told, but %s", chat_format, error)
            self._is_told = True  # once is enough


def _comparisons(row: RawRow, chat_format: str) -> Iterator[Comparison]:
    sample = parse_row(row.content, row.fmt, row.location, Counter(), reading=row.reading)
    if isinstance(sample, Conversation):
        yield from comparisons(sample, chat_format, row.location)

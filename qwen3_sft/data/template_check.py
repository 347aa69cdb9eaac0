"""Text rendered by our code is compared with the tokenizer's own chat template, row by row."""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING

from qwen3_sft.chat.render import self_check
from qwen3_sft.chat.samples import Conversation, Dropped, Sample
from qwen3_sft.chat.template_process import is_shipped
from qwen3_sft.data.formats import parse_row
from qwen3_sft.data.raw_rows import RawRow
from qwen3_sft.data.tokenize_rows import TokenizeOptions
from qwen3_sft.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

CHECKED_ROWS = 100  # whose text is compared with the tokenizer's own chat template


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the template that a tokenizer uses where none is named."""
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


def check_template(
    rows: list[RawRow],
    options: TokenizeOptions,
    tokenizer: PreTrainedTokenizerBase,
    *,
    is_explicit: bool,
) -> None:
    """Compare the first rows' text with what the tokenizer's template renders at inference.

    Raises:
        DataError: if they differ and the format was not chosen by `--chat_format`.
    """
    if options.chat_format is None or not chat_template(tokenizer):
        return
    parsed = [_parsed(row, options) for row in rows if row.problem is None]
    conversations = [sample for sample in parsed if isinstance(sample, Conversation)]
    try:
        is_apart = not is_shipped(tokenizer.chat_template)
        self_check(conversations, tokenizer, options.chat_format, len(rows), is_apart=is_apart)
    except ValueError as error:
        if not is_explicit:
            raise DataError(f"{tokenizer.name_or_path or 'tokenizer'}: {error}") from error
        logger.warning("training on %s as told, but %s", options.chat_format, error)


def _parsed(row: RawRow, options: TokenizeOptions) -> Sample | Dropped | None:
    try:
        return parse_row(row.content, row.fmt, row.location, Counter(), reading=row.reading)
    except DataError:
        if options.on_bad_row == "error":
            raise
        return None  # it is counted once it is tokenised

"""Raw rows -> tokens and labels, in this process or in several, with the same result.

This module is what a worker process imports, so it stays clear of torch and transformers.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Literal, TypeVar

import numpy as np

from qwen3_sft.chat.encoding import Encoder
from qwen3_sft.chat.features import features
from qwen3_sft.chat.pieces import Rendered
from qwen3_sft.chat.render import render, render_plain
from qwen3_sft.chat.samples import Conversation, Dropped, PlainText, Tokens
from qwen3_sft.data.choose_rows import ChosenRow, RowChooser
from qwen3_sft.data.counts import NUM_LONGEST, Counts
from qwen3_sft.data.files.line_ranges import MOST_ROWS
from qwen3_sft.data.formats import parse_row
from qwen3_sft.data.raw_rows import RawRow, RowRange
from qwen3_sft.data.rows.defects import BAD_ROW
from qwen3_sft.data.tokenized_rows import PackedRows, Proof, TokenizedRows, TokenizedSample
from qwen3_sft.data.workers import map_in_workers
from qwen3_sft.errors import DataError

Result = TypeVar("Result")

_PROVED_FIRST, _PROVED_EVERY = 64, 1024  # rows whose ids are compared with the tokenizer's


@dataclass(frozen=True, slots=True)
class TokenizeOptions:
    """What decides the tokens, besides the tokenizer; `DataArguments` explains each.

    Attributes:
        chat_format: None if it is unknown, which is an error once a conversation comes.
        chat_format_problem: why it is unknown.
        vocab_size: token ids of pre-tokenised rows must be below it.
    """

    chat_format: str | None
    chat_format_problem: str
    vocab_size: int
    max_length: int
    overlong: Literal["drop", "error", "truncate"]
    train_on: Literal["assistant", "last_assistant", "all"]
    thinking: Literal["split_turns", "drop_history", "keep"]
    train_empty_think: bool
    on_bad_row: Literal["error", "drop"] = "error"


class RowTokenizer:
    """Turn raw rows into samples of at most `max_length` tokens, counting all that is lost."""

    def __init__(self, encoder: Encoder, options: TokenizeOptions) -> None:
        self.encoder = encoder
        self.options = options
        self._chooser = RowChooser()

    def __call__(self, chunk: list[RawRow] | RowRange) -> TokenizedRows:
        """Tokenise some rows.

        Raises:
            DataError: for a row that cannot be trained on, or is too long with overlong="error".
        """
        if isinstance(chunk, RowRange):
            return self._read_and_tokenize(chunk)
        rows = chunk
        counts = Counts(rows_in=len(rows))
        chosen: list[ChosenRow] = []
        made = [
            (row, rendered)
            for row in rows
            for rendered in self._render_or_drop(row, counts, chosen)
        ]
        encoded = iter(self.encoder.encode_batch([r for _, r in made if not isinstance(r, Tokens)]))
        numbers = {row.raw.number for row in chosen}
        proof = self._proof(r for row, r in made if _is_proved(row.number) or row.number in numbers)
        used: list[TokenizedSample] = []
        longest: list[tuple[int, str]] = []
        lost: dict[int, str] = {}
        lengths: dict[int, list[int]] = {}
        for row, rendered in made:
            if isinstance(rendered, Tokens):
                ids, trained = rendered.input_ids, rendered.trained
            else:
                ids, trained = next(encoded)
            sample = TokenizedSample(row.number, row.location, ids, trained)
            lengths.setdefault(row.number, []).append(len(ids))
            longest.append((len(ids), row.location))
            fitted = self._fit(sample, counts)
            if isinstance(fitted, Dropped):
                counts.samples_dropped.add(fitted.reason, row.location)
                lost.setdefault(row.number, fitted.reason)
            else:
                used.append(fitted)
                ends = self.encoder.turn_ends.count(
                    ids, trained, len(fitted.ids), is_given=isinstance(rendered, Tokens)
                )
                counts.turn_ends.update(ends)
        counts.longest = heapq.nlargest(NUM_LONGEST, longest)
        _count_rows(rows, used, lost, counts)
        counts.add_splits(lengths.values())
        return TokenizedRows(used, counts, chosen, proof)

    def _read_and_tokenize(self, chunk: RowRange) -> TokenizedRows:
        rows: list[RawRow] = []
        try:
            rows.extend(chunk.rows())
        except DataError:
            RowTokenizer.__call__(self, rows)  # an error of a row before comes first
            raise
        return RowTokenizer.__call__(self, rows)

    def _proof(self, made: Iterable[Rendered | Tokens]) -> list[Proof]:
        """Return the texts of some samples with their ids."""
        texts = {
            piece.text: None
            for rendered in made
            if isinstance(rendered, Rendered)
            for piece in rendered.pieces
            if not piece.control
        }
        return list(zip(texts, self.encoder.encode_texts(list(texts)), strict=True))

    def _render_or_drop(
        self, row: RawRow, counts: Counts, chosen: list[ChosenRow]
    ) -> list[Rendered | Tokens]:
        """Return the samples of a row, none of one with a defect where those are dropped."""
        try:
            if row.problem is not None:
                raise DataError(row.problem)
            return self._render(row, counts, chosen)
        except DataError as error:
            if self.options.on_bad_row == "error":
                raise
            counts.drop(BAD_ROW, row.location, str(error).removeprefix(f"{row.location}: "))
            return []

    def _render(
        self, row: RawRow, counts: Counts, chosen: list[ChosenRow]
    ) -> list[Rendered | Tokens]:
        """Return the samples of a row, before they become tokens."""
        warnings: Counter[str] = Counter()
        vocab_size = self.options.vocab_size
        sample = parse_row(
            row.content, row.fmt, row.location, warnings, vocab_size=vocab_size, reading=row.reading
        )
        rendered: list[Rendered | Tokens] = []
        if isinstance(sample, Dropped):
            counts.drop(sample.reason, row.location)
        elif isinstance(sample, Tokens):
            rendered.append(sample)
        elif isinstance(sample, PlainText):
            train_on = self.options.train_on
            rendered.append(render_plain(sample, self.encoder.eos_token, train_on=train_on))
        else:
            rendered += self._render_chat(sample, row.location, warnings)
            row_features = features(sample)
            if self._chooser.wants(row_features):
                chosen.append(ChosenRow(row, row_features))
        for kind, count in warnings.items():
            counts.warnings.add(kind, row.location, count)
        return rendered

    def _render_chat(
        self, sample: Conversation, location: str, warnings: Counter[str]
    ) -> list[Rendered]:
        options = self.options
        if options.chat_format is None:
            raise DataError(f"{location}: cannot render it: {options.chat_format_problem}")
        return render(
            sample,
            options.chat_format,
            train_on=options.train_on,
            thinking=options.thinking,
            train_empty_think=options.train_empty_think,
            location=location,
            warnings=warnings,
        )

    def _fit(self, sample: TokenizedSample, counts: Counts) -> TokenizedSample | Dropped:
        """Apply the policy for over-long samples; one without a label left is dropped."""
        length, limit = len(sample.ids), self.options.max_length
        counts.samples_in += 1
        counts.tokens_in += length
        reason = "no label"
        if length > limit:
            if self.options.overlong == "error":
                raise DataError(
                    f"{sample.location}: {length} tokens, more than max_length {limit}: raise "
                    "--max_length, shorten the row, or set --overlong to drop or truncate"
                )
            if self.options.overlong == "drop":
                counts.tokens_dropped += length
                return Dropped(f"more than {limit} tokens")
            reason = f"no label after truncation to {limit}"
        trained = sample.trained[:limit].copy()
        trained[:1] = False  # nothing comes before a document's first token to predict it from
        labels = int(np.count_nonzero(trained))
        if not labels:
            counts.tokens_dropped += length
            return Dropped(reason)
        counts.samples_truncated += length > limit
        counts.tokens_truncated += max(length - limit, 0)
        counts.tokens_used += len(trained)
        counts.label_tokens += labels
        return TokenizedSample(sample.row, sample.location, sample.ids[:limit], trained)


class RowPacker(RowTokenizer):
    """A `RowTokenizer` whose results are packed."""

    def __call__(self, chunk: list[RawRow] | RowRange) -> PackedRows:  # type: ignore[override]
        """Tokenise some rows."""
        rows = super().__call__(chunk)
        return PackedRows(rows.packed(), rows.counts, rows.chosen, rows.proof)


def _is_proved(row: int) -> bool:
    """Whether the texts of a row are compared with the tokenizer, whatever is in them."""
    return row < _PROVED_FIRST or row % _PROVED_EVERY == 0


def _count_rows(
    rows: list[RawRow], used: list[TokenizedSample], lost: dict[int, str], counts: Counts
) -> None:
    """A row is used if any of its samples is, else dropped for its first sample's reason."""
    used_rows = {sample.row for sample in used}
    counts.rows_used = len(used_rows)
    for row in rows:
        if row.number in lost and row.number not in used_rows:
            counts.drop(lost[row.number], row.location)


def tokenize_chunks(
    tokenize: Callable[[list[RawRow] | RowRange], Result],
    rows: Iterable[RawRow | RowRange],
    *,
    num_proc: int,
    chunk_rows: int = MOST_ROWS,
) -> Generator[Result]:
    """Tokenise rows in chunks, in order, with as many processes as pay off.

    The first error in the order of the rows is the one that is raised, whoever met it.

    Args:
        tokenize: makes something of a chunk.
        rows: in order; a range is a chunk of its own, read by the process that gets it.
        num_proc: processes.
        chunk_rows: of other chunks.

    Raises:
        ValueError: if `num_proc` is below 1.
        WorkerError: a process could not start, or ended before its work.
    """
    if num_proc < 1:
        raise ValueError(f"num_proc is {num_proc}; set it to 1 or more")
    chunks = _chunks(rows, chunk_rows)
    # One chunk is done before a process has started.
    first = list(islice(chunks, 2)) if num_proc > 1 else []
    chunks = chain(first, chunks)
    if len(first) < 2:
        return (tokenize(chunk) for chunk in chunks)
    return map_in_workers(tokenize, chunks, num_proc)


def _chunks(
    rows: Iterable[RawRow | RowRange], chunk_rows: int
) -> Iterator[list[RawRow] | RowRange]:
    """Yield ranges as they are, and the rows between them in lists."""
    chunk: list[RawRow] = []
    try:
        for row in rows:
            if not isinstance(row, RowRange):
                chunk.append(row)
                if len(chunk) < chunk_rows:
                    continue
            if chunk:
                yield chunk
                chunk = []
            if isinstance(row, RowRange):
                yield row
    except DataError:
        if chunk:
            yield chunk  # an error of a row before comes first
        raise
    if chunk:
        yield chunk

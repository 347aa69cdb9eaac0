"""The lines of `qwen3-sft data inspect`: samples with their labels, and what is lost."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from qwen3_sft.chat.encoding import Encoder
from qwen3_sft.chat.samples import IGNORED
from qwen3_sft.data.prepare import tokenize_options
from qwen3_sft.data.raw_rows import RowsRead, raw_rows
from qwen3_sft.data.readers import entries_of, find_sources
from qwen3_sft.data.report import check_drops, make_report, report_origin, report_text
from qwen3_sft.data.source_counts import SourceCounts
from qwen3_sft.data.template_check import TemplateCheck
from qwen3_sft.data.tokenize_rows import Counts, RowTokenizer, tokenize_chunks
from qwen3_sft.data.tokenized_rows import TokenizedRows, TokenizedSample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qwen3_sft.options.data_args import DataArguments

_COLOUR = ("\x1b[32m", "\x1b[0m")  # green marks the trained text
_PLAIN = ("«", "»")


def inspect(
    args: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    n: int,
    fmt: Literal["text", "json"],
    *,
    color: bool = False,
) -> Iterator[str]:
    """Yield what `qwen3-sft data inspect` prints, for the first `n` samples.

    What training refuses in these rows is refused here: rows take the same way.

    Args:
        args: the sources and what to make of them.
        tokenizer: of the model.
        n: samples to show; dropped ones do not count.
        fmt: `json` gives one object per sample: location, input_ids, labels (aligned, -100 masked),
            text, the list of trained texts and the warnings of its row; the last one also has
            `report`, with drops and all warnings of the rows read, as `data_report.json` has them.
            `text` adds headers, drops and a summary.
        color: mark trained text in green instead of between « and » (`text` only).

    Raises:
        DataError: for a source or a row that cannot be trained on, a chat template that differs
            from what is trained, or when `json` has no sample.
    """
    sources = find_sources(args)
    tokenize = RowTokenizer(Encoder(tokenizer, fast=False), tokenize_options(args, tokenizer))
    check = TemplateCheck(tokenize.options, tokenizer, is_explicit=args.chat_format != "auto")
    read = RowsRead()
    counts = Counts(warnings=read.warnings)
    of_sources = SourceCounts(entries_of(sources), read)
    rows = raw_rows(sources, args, read)
    # All of them are checked before the first is shown.
    chunks = list(check(_until(tokenize_chunks(tokenize, rows, num_proc=1, chunk_rows=1), n)))
    for chunk in chunks:
        counts.merge(chunk.counts)
        of_sources.add(chunk.packed())
    samples = [sample for chunk in chunks for sample in chunk.samples]
    report = make_report(counts, np.array([len(sample.ids) for sample in samples], np.int64))
    report.update(report_origin(sources, read.formats, tokenize.options))
    report["sources"] = of_sources.report(counts.rows_in)
    if fmt == "json":
        if n and not samples:
            check_drops(report, max_drop_fraction=1.0)  # says why there is nothing to show
        yield from _json_lines(chunks, n, report, tokenizer)
        return
    marks = _COLOUR if color else _PLAIN
    for chunk in chunks:
        yield from _remarks(chunk.counts)
        for sample in chunk.samples[:n]:
            n -= 1
            yield from _as_text(sample, tokenizer, marks)
    yield report_text(report)


def _until(chunks: Iterable[TokenizedRows], n: int) -> Iterator[TokenizedRows]:
    """Pass chunks on, read one by one, until they have `n` samples."""
    for chunk in chunks if n else ():
        yield chunk
        n -= len(chunk.samples)
        if n <= 0:
            return


def _remarks(counts: Counts) -> Iterator[str]:
    """Yield what is lost or odd in one row."""
    dropped = counts.samples_dropped if counts.samples_dropped.total else counts.rows_dropped
    for reason, count, location in dropped:
        yield f"{location}: dropped, {count} x {reason}"
    if counts.tokens_truncated:
        yield f"{counts.longest[0][1]}: {counts.tokens_truncated} tokens cut off"
    for kind, count, location in counts.warnings:
        yield f"{location}: warning, {count} x {kind}"


def _json_lines(
    chunks: list[TokenizedRows], n: int, report: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> Iterator[str]:
    shown = [(sample, chunk.counts) for chunk in chunks for sample in chunk.samples][:n]
    for number, (sample, of_row) in enumerate(shown, 1):
        warnings = {kind: count for kind, count, _ in of_row.warnings}
        fields = {**_fields(sample, tokenizer), "warnings": warnings}
        if number == len(shown):
            fields["report"] = report
        yield json.dumps(fields, ensure_ascii=False)


def _fields(sample: TokenizedSample, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {
        "location": sample.location,
        "input_ids": sample.ids.tolist(),
        "labels": np.where(sample.trained, sample.ids, IGNORED).tolist(),
        "text": _decode(sample.ids, tokenizer),
        "trained": [text for text, trained in _spans(sample, tokenizer) if trained],
    }


def _as_text(
    sample: TokenizedSample, tokenizer: PreTrainedTokenizerBase, marks: tuple[str, str]
) -> Iterator[str]:
    num_labels = int(sample.trained.sum())
    share = num_labels / len(sample.ids)
    yield f"--- {sample.location}: {len(sample.ids)} tokens, {num_labels} labels ({share:.0%})"
    before, after = marks
    yield "".join(
        f"{before}{text}{after}" if trained else text for text, trained in _spans(sample, tokenizer)
    )


def _spans(
    sample: TokenizedSample, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[str, bool]]:
    """Yield (text, trained) of each stretch of equally trained tokens."""
    borders = np.flatnonzero(np.diff(sample.trained)) + 1
    starts = [0, *borders.tolist()]
    for start, ids in zip(starts, np.split(sample.ids, borders), strict=True):
        yield _decode(ids, tokenizer), bool(sample.trained[start])


def _decode(ids: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> str:
    text = tokenizer.decode(
        ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return str(text)

"""The lines of `qwen3-sft data inspect`: samples with their labels, and what is lost."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import numpy as np

from qwen3_sft.chat.encoding import Encoder
from qwen3_sft.chat.samples import IGNORED
from qwen3_sft.data.prepare import tokenize_options
from qwen3_sft.data.raw_rows import raw_rows
from qwen3_sft.data.readers import find_sources
from qwen3_sft.data.report import check_drops, make_report, report_origin, report_text
from qwen3_sft.data.tokenize_rows import Counts, RowTokenizer, TokenizedSample

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

    Args:
        args: the sources and what to make of them.
        tokenizer: of the model.
        n: samples to show; dropped ones do not count.
        fmt: `json` gives one object per sample: input_ids, labels (aligned, -100 masked), text
            and the list of trained texts; `text` adds headers, drops and a summary.
        color: mark trained text in green instead of between « and » (`text` only).

    Raises:
        DataError: for a source or a row that cannot be trained on, or when `json` has no sample.
    """
    sources = find_sources(args)
    tokenize = RowTokenizer(Encoder(tokenizer), tokenize_options(args, tokenizer))
    counts, formats, lengths, shown = Counts(), Counter[str](), [], 0
    rows = raw_rows(sources, args, counts.warnings, formats)
    while shown < n and (row := next(rows, None)) is not None:
        result = tokenize([row])
        counts.merge(result.counts)
        lengths += [len(sample.ids) for sample in result.samples]
        if fmt == "text":
            yield from _remarks(row.location, result.counts)
        for sample in result.samples[: n - shown]:
            shown += 1
            yield from (
                _as_json(sample, tokenizer)
                if fmt == "json"
                else _as_text(sample, tokenizer, _COLOUR if color else _PLAIN)
            )
    report = make_report(counts, np.array(lengths, np.int64))
    report.update(report_origin(sources, formats, tokenize.options))
    if fmt == "text":
        yield report_text(report)
    elif n and not shown:
        check_drops(report, max_drop_fraction=1.0)  # says why there is nothing to show


def _remarks(location: str, counts: Counts) -> Iterator[str]:
    """Yield what is lost or odd in one row."""
    dropped = counts.samples_dropped if counts.samples_dropped.total else counts.rows_dropped
    for reason, count, _ in dropped:
        yield f"{location}: dropped, {count} x {reason}"
    if counts.tokens_truncated:
        yield f"{location}: {counts.tokens_truncated} tokens cut off"
    for kind, count, _ in counts.warnings:
        yield f"{location}: warning, {count} x {kind}"


def _as_json(sample: TokenizedSample, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    labels = np.where(sample.trained, sample.ids, IGNORED)
    yield json.dumps(
        {
            "input_ids": sample.ids.tolist(),
            "labels": labels.tolist(),
            "text": _decode(sample.ids, tokenizer),
            "trained": [text for text, trained in _spans(sample, tokenizer) if trained],
        },
        ensure_ascii=False,
    )


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

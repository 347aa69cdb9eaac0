"""Prepare data: rows -> tokens, once, into a cache that every rank and every later run maps.

Call `prepare` before the process group exists. All ranks call it: the first one to take the lock
tokenises, the others wait for it outside any collective, so that no timeout of the group counts,
and a second start finds the cache by its key.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from qwen3_sft.chat.encoding import Encoder
from qwen3_sft.chat.ids_check import IdsCheck
from qwen3_sft.chat.render import detect_chat_format
from qwen3_sft.data.cache_key import cache_key
from qwen3_sft.data.identity import cache_folder, parts_of, say_what_is_asked
from qwen3_sft.data.raw_rows import RowsRead, rows_or_ranges
from qwen3_sft.data.readers import EntrySource, entries_of, find_sources
from qwen3_sft.data.report import check_drops, make_report, report_origin, report_text
from qwen3_sft.data.source_counts import SourceCounts
from qwen3_sft.data.template_check import TemplateCheck, chat_template
from qwen3_sft.data.token_store import TokenDataset, TokenWriter
from qwen3_sft.data.tokenize_rows import Counts, RowPacker, TokenizeOptions, tokenize_chunks
from qwen3_sft.data.workers import few_collections
from qwen3_sft.errors import DataError, told_as

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qwen3_sft.options.data_args import DataArguments

logger = logging.getLogger(__name__)

_SMALL_BYTES = 32 << 20
_MOST_PROCESSES = 32


def prepare(
    args: DataArguments, tokenizer: PreTrainedTokenizerBase, *, eval: bool = False
) -> TokenDataset:
    """Tokenise `dataset` (or `eval_dataset`), or open the cache of an earlier run.

    Args:
        args: the sources and what to make of them.
        tokenizer: of the model; a fast one with Qwen3's control tokens.
        eval: take `eval_dataset` instead of `dataset`.

    Raises:
        DataError: for a source or a row that cannot be trained on, or too many dropped rows.
        UsageError: the cache's folder cannot be made.
        RuntimeError: if a process group exists already.
    """
    _refuse_process_group()
    sources = find_sources(args, eval=eval)
    options = tokenize_options(args, tokenizer)
    cache = cache_folder(args)
    parts = parts_of(args, sources, options, tokenizer, cache)
    key = cache_key(parts)
    folder = cache / key
    if not _is_whole(folder):
        # A full disk's error names no file.
        where = f"{cache}: the token cache cannot be written (--data_cache_dir puts it elsewhere)"
        with told_as(DataError, where, OSError), _locked(cache / f"{key}.lock"):
            if not _is_whole(folder):
                _build(folder, args, sources, options, tokenizer)
    dataset = TokenDataset(folder)
    say_what_is_asked(dataset.report, parts, args, sources)
    check_drops(dataset.report, args.max_drop_fraction)
    logger.info("%s", report_text(dataset.report))
    return dataset


def tokenize_options(args: DataArguments, tokenizer: PreTrainedTokenizerBase) -> TokenizeOptions:
    """Pick what decides the tokens; `chat_format` "auto" is read off the chat template."""
    chat_format, problem = _chat_format(args, tokenizer)
    return TokenizeOptions(
        chat_format=chat_format,
        chat_format_problem=problem,
        vocab_size=len(tokenizer),
        max_length=args.max_length,
        overlong=args.overlong,
        train_on=args.train_on,
        thinking=args.thinking,
        train_empty_think=args.train_empty_think,
        on_bad_row=args.on_bad_row,
    )


def _chat_format(args: DataArguments, tokenizer: PreTrainedTokenizerBase) -> tuple[str | None, str]:
    """Return the format, or why there is none: an error only once a conversation needs it."""
    if args.chat_format != "auto":
        return args.chat_format, ""
    try:
        return detect_chat_format(chat_template(tokenizer)), ""
    except ValueError as error:
        return None, str(error)


def _refuse_process_group() -> None:
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        raise RuntimeError(
            "prepare() was called after torch.distributed was initialised; other ranks' "
            "collectives would time out while one tokenises: call it before TrainingArguments"
        )


def _is_whole(folder: Path) -> bool:
    """Whether the cache folder is there and its files have the sizes that its report states."""
    if not folder.exists():
        return False
    try:
        dataset = TokenDataset(folder)
    except (OSError, ValueError, KeyError) as error:
        logger.warning("token cache %s is damaged (%s); it is made anew", folder, error)
        return False
    return len(dataset) == dataset.report["samples_used"]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock between processes; say so when it has to be waited for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("another process prepares the data; waiting for %s", path)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _build(
    folder: Path,
    args: DataArguments,
    sources: list[EntrySource],
    options: TokenizeOptions,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Make the cache in a folder beside it and rename that; the lock is held."""
    started = time.perf_counter()
    _remove_leftovers(folder)
    for fast in (True, False):
        partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial-", dir=folder.parent))
        try:
            with TokenWriter(partial) as writer, few_collections():
                encoder = Encoder(tokenizer, fast=fast)
                if fast and encoder.why_slow:
                    logger.info(
                        "`tokenizers` encodes, not the faster tiktoken: %s", encoder.why_slow
                    )
                report = _tokenize(writer, args, sources, options, encoder, tokenizer)
                if report is None:
                    continue
                report["key"] = folder.name
                report["seconds"] = round(time.perf_counter() - started, 3)
                writer.finish(report)
            partial.rename(folder)
            return
        finally:
            shutil.rmtree(partial, ignore_errors=True)  # there is none after the rename


def _remove_leftovers(folder: Path) -> None:
    """Remove a damaged cache, and what a killed process left of this one."""
    for leftover in [folder, *folder.parent.glob(f"{folder.name}.partial-*")]:
        if leftover.exists():
            shutil.rmtree(leftover)


def _tokenize(
    writer: TokenWriter,
    args: DataArguments,
    sources: list[EntrySource],
    options: TokenizeOptions,
    encoder: Encoder,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any] | None:
    """Write the tokens of all rows; return the report, or None if they are not the tokenizer's."""
    read, lengths = RowsRead(), []
    counts, of_sources = Counts(warnings=read.warnings), SourceCounts(entries_of(sources), read)
    num_proc = _num_proc(args, sources)
    rows = rows_or_ranges(sources, args, read, in_ranges=num_proc > 1)
    are_right = IdsCheck(encoder, tokenizer)
    check = TemplateCheck(options, tokenizer, is_explicit=args.chat_format != "auto")
    tokenized = tokenize_chunks(RowPacker(encoder, options), rows, num_proc=num_proc)
    with tqdm(desc="tokenising", unit=" rows", delay=2) as progress, closing(tokenized) as chunks:
        for chunk in check(chunks):
            if not are_right(chunk.proof):
                return None
            lengths.append(chunk.samples.lengths)
            writer.append(chunk.samples)
            of_sources.add(chunk.samples)
            counts.merge(chunk.counts)
            progress.update(chunk.counts.rows_in)
    return {
        **report_origin(sources, read.formats, options),
        "sources": of_sources.report(counts.rows_in),
        **make_report(counts, np.concatenate([*lengths, np.empty(0, np.int64)])),
    }


def _num_proc(args: DataArguments, sources: list[EntrySource]) -> int:
    """Return what was asked for, else as many processes as cores once their start pays off."""
    if args.num_proc is not None:
        return args.num_proc
    files = [Path(source.name) for source in sources]
    are_local = all(file.is_file() for file in files)
    if are_local and sum(file.stat().st_size for file in files) < _SMALL_BYTES:
        return 1  # the tokenizer's own threads are done before a process has started
    return min(len(os.sched_getaffinity(0)), _MOST_PROCESSES)

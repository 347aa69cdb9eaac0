"""What decides the tokens of data: the name of its cache, and the hashes that a run keeps."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen3_sft.data.cache_key import FileHashes, describe_all, text_hash
from qwen3_sft.data.readers import EntrySource, entries_of, find_sources
from qwen3_sft.data.template_check import chat_template
from qwen3_sft.data.tokenize_rows import TokenizeOptions
from qwen3_sft.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qwen3_sft.options.data_args import DataArguments

_ROW_OPTIONS = ("dataset_format", "columns", "ignore_columns", "on_bad_row", "txt_rows")


def cache_folder(args: DataArguments) -> Path:
    """Return where token caches lie, which is made if need be.

    Raises:
        UsageError: it cannot be made.
    """
    folder = Path.home() / ".cache" / "qwen3_sft" / "tokens"
    if args.data_cache_dir:
        folder = Path(args.data_cache_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--data_cache_dir {folder}: {error.strerror}; set another one") from error
    return folder


def parts_of(
    args: DataArguments,
    sources: list[EntrySource],
    options: TokenizeOptions,
    tokenizer: PreTrainedTokenizerBase,
    cache: Path,
) -> dict[str, Any]:
    """Return all that decides the tokens."""
    hashes = _hashes(cache)
    vocabulary = _tokenizer_hash(tokenizer, hashes)
    return {
        "sources": _describe(sources, hashes),
        "entries": _limits(sources),
        "splits": [source.split for source in sources],
        "max_rows": args.max_rows,
        "rows": {name: getattr(args, name) for name in _ROW_OPTIONS},
        "is_template_checked": args.chat_format == "auto",
        "options": {name: getattr(options, name) for name in options.__slots__},
        "chat_template": text_hash(chat_template(tokenizer) or ""),
        "tokenizer": vocabulary,
        "eos_token": str(tokenizer.eos_token),
    }


def _tokenizer_hash(tokenizer: PreTrainedTokenizerBase, hashes: FileHashes) -> str:
    """Return the hash of all that a tokenizer's library knows of it.

    Writing that down takes 0.2 s for a vocabulary of 150,000, so it is remembered by the file that
    the tokenizer came from, what may be set in memory, and ids of a text.
    """

    def whole() -> str:
        return text_hash(tokenizer.backend_tokenizer.to_str())

    file = Path(tokenizer.name_or_path or "", "tokenizer.json")
    if not tokenizer.is_fast or not tokenizer.name_or_path or not file.is_file():
        return whole()
    backend = tokenizer.backend_tokenizer
    parts = (backend.normalizer, backend.pre_tokenizer, backend.post_processor, backend.decoder)
    model = {name: getattr(backend.model, name, None) for name in _MODEL}
    state = [
        *(version(package) for package in ("tokenizers", "transformers")),
        type(tokenizer).__name__,
        *(None if part is None else part.__getstate__().decode() for part in parts),
        model, backend.truncation, backend.padding,
        {i: repr(token) for i, token in tokenizer.added_tokens_decoder.items()},
        backend.get_vocab_size(), backend.encode(_PROBE, add_special_tokens=False).ids,
    ]  # fmt: skip
    return hashes.of_loaded(file, json.dumps(state), whole)


_MODEL = (
    "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk",
    "byte_fallback", "ignore_merges",
)  # fmt: skip
_PROBE = "The quick brown fox's 123 {jumps}: 敏捷的棕色狐狸, быстрая лиса, zwölf Boxkämpfer 😀\n\n"


def _hashes(cache: Path) -> FileHashes:
    return FileHashes(cache / "file_hashes.json")


def _describe(sources: list[EntrySource], hashes: FileHashes) -> list[tuple[str, str]]:
    return describe_all([source.reader for source in sources], hashes)


def _limits(sources: list[EntrySource]) -> list[list[Any]]:
    """Return for each source what its entry says of its rows."""
    entries = [(source.number, source.entry) for source in sources]
    return [[n, e.max_rows, e.format, *(e.columns or ())] for n, e in entries]


def data_fingerprint(args: DataArguments, *, eval: bool = False) -> str:
    """Return the hash of what `dataset` (or `eval_dataset`) holds now, as a report has it.

    Raises:
        DataError: a source cannot be found.
    """
    sources = find_sources(args, eval=eval)
    hashes = _hashes(cache_folder(args))
    parts = {"sources": _describe(sources, hashes), "entries": _limits(sources)}
    return _of_rows(parts, args, _repeats(sources))


def _repeats(sources: list[EntrySource]) -> list[float]:
    return [entry.repeat for entry in entries_of(sources)]


def _of_rows(parts: dict[str, Any], args: DataArguments, repeats: list[float]) -> str:
    kept = [args.max_rows, args.overlong, *(getattr(args, name) for name in _ROW_OPTIONS)]
    mixture = [repeats, parts["entries"]]
    is_plain = mixture == [[1.0] * len(repeats), _plain_limits(parts["entries"], args)]
    identities = [identity for _, identity in parts["sources"]]
    return _json_hash([identities, *kept, *([] if is_plain else [mixture])])


def _plain_limits(limits: list[list[Any]], args: DataArguments) -> list[list[Any]]:
    """Return the limits of entries that say nothing of their own."""
    return [[number, None, args.dataset_format, *args.columns] for number, *_ in limits]


def say_what_is_asked(
    report: dict[str, Any], parts: dict[str, Any], args: DataArguments, sources: list[EntrySource]
) -> None:
    """Complete a report by what this run asks of tokens that another may have prepared."""
    repeats = _repeats(sources)
    report["fingerprints"] = _fingerprints(parts, args, repeats)
    for source, repeat in zip(report["sources"], repeats, strict=True):
        source["repeat"] = repeat


def _fingerprints(
    parts: dict[str, Any], args: DataArguments, repeats: list[float]
) -> dict[str, str]:
    """Return hashes of `_parts` under the names that a person changes, wherever files lie."""
    options = parts["options"]
    shown = ("chat_format", "train_on", "thinking", "train_empty_think")
    return {
        "data": _of_rows(parts, args, repeats),
        "template": _json_hash([parts["chat_template"], *(options[name] for name in shown)]),
        "tokenizer": _json_hash([parts["tokenizer"], parts["eos_token"]]),
    }


def _json_hash(part: Any) -> str:
    return text_hash(json.dumps(part, sort_keys=True))

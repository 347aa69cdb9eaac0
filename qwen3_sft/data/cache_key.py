"""The name of a token cache: a hash of everything that decides the tokens.

Files count by content, not by name or time. Hashing a corpus on every start would take longer than
reading its tokens, so a file's hash is remembered by (path, size, modification time, inode).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from qwen3_sft.chat import (
    contexts,
    control_tokens,
    encoding,
    fast_bpe,
    features,
    pieces,
    render,
    samples,
    templates,
    text,
    turn_ends,
    written,
)
from qwen3_sft.data import (
    choose_rows,
    counts,
    formats,
    json_rows,
    raw_rows,
    readers,
    tally,
    token_store,
    tokenize_rows,
    tokenized_rows,
    turns,
    workers,
)
from qwen3_sft.data.files import (
    compressed,
    csv_rows,
    dataset_card,
    datasets_rows,
    file_kinds,
    folders,
    line_ranges,
    splits,
    strict_json,
    table_rows,
    txt_rows,
    wrapped_rows,
)
from qwen3_sft.data.rows import (
    answers,
    calls,
    columns,
    content,
    conversations,
    defects,
    fields,
    loss_flags,
    nulls,
    plain,
    questions,
    reasoning,
    refused,
    source,
    split_column,
    token_rows,
    turn_lists,
    values,
    written_calls,
)

logger = logging.getLogger(__name__)

LAYOUT = 3  # of the cache folder; raise it when the meaning of its files changes
# A row's way to tokens, all of it: a forgotten module would serve stale caches (a test checks).
TOKENISERS = (
    answers, calls, choose_rows, columns, compressed, content, contexts, control_tokens,
    conversations, counts, csv_rows, dataset_card, datasets_rows, defects, encoding, fast_bpe,
    features, fields, file_kinds, folders, formats, json_rows, line_ranges, loss_flags, nulls,
    pieces, plain, questions, raw_rows, readers, reasoning, refused, render, samples, source,
    split_column, splits, strict_json, table_rows, tally, templates, text, token_rows, token_store,
    tokenize_rows, tokenized_rows, turn_ends, turn_lists, turns, txt_rows, values, workers,
    wrapped_rows, written, written_calls,
)  # fmt: skip
_SETTLED_S = 2.0  # a file changed more recently may change again within the clock's resolution


def cache_key(parts: dict[str, Any]) -> str:
    """Return a short hash of `parts`, the cache's layout and the code that makes the tokens."""
    code = [hashlib.blake2b(Path(str(m.__file__)).read_bytes()).hexdigest() for m in TOKENISERS]
    described = json.dumps([LAYOUT, code, parts], sort_keys=True)
    return hashlib.blake2b(described.encode(), digest_size=12).hexdigest()


def text_hash(text: str) -> str:
    """Return the hash of a text."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class FileHashes:
    """Content hashes of files, remembered in a JSON file between runs."""

    def __init__(self, memo: Path) -> None:
        self.memo = memo
        self._known = _read(memo) or {}
        self._new: dict[str, str] = {}

    def __call__(self, path: Path) -> str:
        """Return the content hash of a file."""
        status = path.stat()
        identity = f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}|{status.st_ino}"
        if identity in self._known:
            return self._known[identity]
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, _blake2).hexdigest()
        if time.time() - status.st_mtime > _SETTLED_S:
            self._new[identity] = digest
        return digest

    def of_loaded(self, path: Path, state: str, make: Callable[[], str]) -> str:
        """Return what was made of a file that is in memory, as it is remembered for its content.

        Args:
            path: of the file.
            state: all that may have been changed in memory since it was read.
            make: takes long.
        """
        identity = f"loaded|{self(path)}|{text_hash(state)}|"
        if identity not in self._known:
            self._known[identity] = made = make()
            if time.time() - path.stat().st_mtime > _SETTLED_S:
                self._new[identity] = made
        return self._known[identity]

    def save(self) -> None:
        """Write what was learnt; a run that saves at the same moment may win, at no harm."""
        if not self._new:
            return
        self.memo.parent.mkdir(parents=True, exist_ok=True)
        known = _read(self.memo)
        if known is None:
            return
        partial = self.memo.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps({**known, **self._new}), encoding="utf-8")
        partial.replace(self.memo)
        self._new = {}


def _blake2() -> Any:
    return hashlib.blake2b(digest_size=16)


def _read(memo: Path) -> dict[str, str] | None:
    """Return the remembered hashes; None if the memo is damaged or not ours."""
    if not memo.exists():
        return {}
    try:
        known = json.loads(memo.read_text(encoding="utf-8"))
    except ValueError:
        known = None
    if isinstance(known, dict) and all(name.count("|") >= 3 for name in known):
        return known
    logger.warning("%s is damaged or not ours: files are hashed at each start, remove it", memo)
    return None


def describe_all(sources: Iterable[Any], hashes: FileHashes) -> list[tuple[str, str]]:
    """Return (name, identity) of each source and remember the hashes computed on the way."""
    described = [(source.name, source.identity(hashes)) for source in sources]
    hashes.save()
    return described

"""The record that makes a folder a checkpoint: every file with its size and hash, written last.

A folder without a manifest is a save that did not finish. The hashes come from the processes that
wrote the files (`ledger.py`); only what nobody hashed on the way is read again here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from qwen3_sft.checkpoints.ledger import Entry, Ledger, hash_file
from qwen3_sft.errors import CheckpointError

MANIFEST = "manifest.json"
_OWN_HASH = "xxh3"

_THREADS = 8  # xxhash and reads release the GIL; more do not help one disk


@dataclass
class Totals:
    """What a run has counted since its first step beside transformers' state; in every manifest.

    Attributes:
        skipped_steps: whose loss or gradient was not finite.
        tokens_seen: of all ranks, padding left out, up to the last record.
    """

    skipped_steps: int = 0
    tokens_seen: int = 0


def seal(folder: Path, entries: Mapping[str, Entry], **facts: Any) -> None:
    """Write the manifest, flushed to disk.

    Args:
        folder: with everything in it that the checkpoint consists of.
        entries: of the files that were hashed while they were written (`Ledger.entries`), of all
            ranks. Other files in the folder are read, hashed and flushed here.
        **facts: recorded beside `files`.

    Raises:
        CheckpointError: an entered file is not there, or not as long as it was written: another
            process sees another folder.
        OSError: a file cannot be read, or the manifest cannot be written.
    """
    for name, entry in entries.items():
        _check_size(folder / name, entry)
    ledger = Ledger(folder)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != MANIFEST and name not in entries:
            ledger.record(path)
    files = dict(sorted({**entries, **ledger.entries}.items()))
    content = {**facts, "files": files}
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump({_OWN_HASH: _own_hash(content), **content}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def verify(folder: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint whose files are all there and unchanged.

    Raises:
        CheckpointError: naming the first file that is missing, short or altered.
    """
    manifest = check_sizes(folder)
    files: dict[str, Entry] = manifest["files"]
    with ThreadPoolExecutor(min(_THREADS, max(1, len(files)))) as pool:
        hashes = pool.map(lambda name: _hash(folder / name), files)
        for name, found in zip(files, hashes, strict=True):
            if found != files[name]["xxh3"]:
                pool.shutdown(wait=False, cancel_futures=True)
                raise CheckpointError(f"{folder / name}: content differs from what was saved")
    return manifest


def check_sizes(folder: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint whose files all have their size; read none of them.

    Raises:
        CheckpointError: naming the first file that is missing or has another size.
    """
    manifest = read_manifest(folder)
    for name, entry in manifest["files"].items():
        _check_size(folder / name, entry)
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest without looking at the files that it lists.

    Raises:
        CheckpointError: there is none, or it is not one.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{folder}: no {MANIFEST}; the save did not finish")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSON and UTF-8 alike
        raise CheckpointError(f"{path}: not JSON, {error}") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise CheckpointError(f"{path}: no list of files in it")
    for name, entry in manifest["files"].items():
        is_entry = isinstance(entry, dict) and {"bytes", "xxh3"} <= entry.keys()
        if not is_entry or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise CheckpointError(f"{path}: {name} is not a file of this folder with size and hash")
    own_hash = manifest.pop(_OWN_HASH, None)  # those of earlier versions have none
    if own_hash is not None and own_hash != _own_hash(manifest):
        raise CheckpointError(f"{path}: content differs from what was saved")
    return manifest


def added_files(folder: Path) -> list[str]:
    """Return what somebody has put into a checkpoint since it was sealed.

    Raises:
        CheckpointError: it has no manifest.
    """
    known = {MANIFEST, *read_manifest(folder)["files"]}
    paths = (path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir())
    return [name for path in paths if (name := path.relative_to(folder).as_posix()) not in known]


def _own_hash(content: Mapping[str, Any]) -> str:
    """Return the hash of all that a manifest says beside it."""
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def _check_size(path: Path, entry: Entry) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path}: missing")
    if (size := path.stat().st_size) != entry["bytes"]:
        raise CheckpointError(f"{path}: {size} bytes, the manifest says {entry['bytes']}")


def _hash(path: Path) -> str:
    try:
        return hash_file(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error

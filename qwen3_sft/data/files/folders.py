"""What of a folder is read: the data files of one split; the rest is left and said to be."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import islice
from pathlib import Path, PurePath

from qwen3_sft.data.files.dataset_card import declared_splits
from qwen3_sft.data.files.splits import TRAIN, Splits, choose_split, splits_of
from qwen3_sft.errors import DataError

logger = logging.getLogger(__name__)

# Of the hub's FILES_TO_IGNORE and `Dataset.save_to_disk`: JSON files that hold no rows.
_METADATA = {
    "config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json",
}  # fmt: skip
# Endings that may hold rows: left out without a word, they would be rows that nobody trains.
_MAY_HOLD_ROWS = {
    ".csv", ".tsv", ".ndjson", ".xlsx", ".xls", ".ods", ".feather", ".orc", ".avro", ".lance",
    ".gz", ".zst", ".bz2", ".xz", ".lz4", ".zip", ".tar", ".tgz", ".7z", ".rar", ".pkl", ".pickle",
    ".npy", ".npz", ".pt", ".h5", ".hdf5", ".db", ".sqlite", ".sqlite3", ".tfrecord", ".tfrecords",
    ".msgpack", ".bin", ".mds", ".xml", ".parq", ".pq", ".json5", ".jsonlines", ".jl",
}  # fmt: skip
_NAMED = 3  # files in a message, the others are counted


def folder_files(
    folder: Path,
    asked: str | None,
    config: str | None,
    is_data: Callable[[Path], bool],
    *,
    kinds: str,
) -> list[Path]:
    """Return the data files of a split of a folder, sorted by path; say what was left.

    Args:
        folder: searched with its sub-folders; hidden ones and those named `__...` are not.
        asked: the split; None takes validation, else test, else all of a folder without splits.
        config: which of the configurations that a README.md declares; None: its default one.
        is_data: whether a file can be read, by its name.
        kinds: what those are, for messages.

    Raises:
        DataError: there is no data, no such split, or a file in it that cannot be read.
    """
    hidden: list[PurePath] = []
    seen = sorted(_walk(folder, hidden))
    readable = {file for file in seen if is_data(folder / file) and file.name not in _METADATA}
    may_be = [file for file in seen if file in readable or file.suffix.lower() in _MAY_HOLD_ROWS]
    if not may_be:
        found = f"; it has {_names(seen)}" if seen else ""
        raise DataError(f"{folder}: no {kinds} file in this folder{found}")
    splits = declared_splits(folder, may_be, config) or splits_of(may_be, folder)
    split = choose_split(splits.files, asked)
    if split is None and asked is None and not splits.are_told:
        split = TRAIN
    if split is None:
        raise DataError(_missing(folder, asked, splits.files, splits.unnamed))
    taken = splits.files[split]
    if unread := [file for file in taken if file not in readable]:
        raise DataError(
            f"{folder / unread[0]}: unknown kind of file ({len(unread)} such in {folder}); "
            f"accepted are {kinds}: convert it or move it away"
        )
    left = {
        **{name: files for name, files in splits.files.items() if name != split},
        "without a split": splits.unnamed,
        "no data": [file for file in seen if file not in may_be],
        "hidden": hidden,
    }
    if any(left.values()):
        _say(_choice(folder, split, splits, left))
    return [folder / file for file in taken]


def saved_split(folder: Path, there: Collection[str], asked: str | None) -> str:
    """Return the split to read of a saved dataset, by its name there.

    Raises:
        DataError: it is not there.
    """
    split = choose_split(there, asked)
    if split is None:
        raise DataError(_missing(folder, asked, there))
    if left := sorted(set(there) - {split}):
        _say(f"{folder}: the split {split} is read; left: {', '.join(left)}")
    return split


def _walk(folder: Path, hidden: list[PurePath]) -> Iterator[PurePath]:
    """Yield the files below a folder, relative to it; what is hidden goes to `hidden`."""
    seen = set[str]()
    for place, inner, names in os.walk(folder, followlinks=True):
        here = Path(place).relative_to(folder)
        if (real := os.path.realpath(place)) in seen:  # a link to what is read already
            inner.clear()
            continue
        seen.add(real)
        private = sorted(name for name in inner if name.startswith((".", "__")))
        inner[:] = [name for name in inner if name not in private]
        dotted = sorted(name for name in names if name.startswith("."))
        hidden += [here / name for name in (*private, *dotted)]
        yield from (here / name for name in names if not name.startswith("."))


def _missing(
    folder: Path, asked: str | None, there: Iterable[str], unnamed: Collection[PurePath] = ()
) -> str:
    beside = f", and without a split {_names(unnamed)}" if unnamed else ""
    has = f"it has {', '.join(sorted(there))}{beside}"
    if asked is None:
        return (
            f"{folder}: no validation or test split to evaluate on; {has}: name the split behind "
            f"a colon (--eval_dataset {folder}:{min(there)}), or the files"
        )
    return (
        f"{folder}: no split {asked!r}; {has}: set --dataset_split, name the split behind a colon "
        f"({folder}:{min(there)}), or name the files"
    )


def _choice(folder: Path, split: str, splits: Splits, left: dict[str, list[PurePath]]) -> str:
    what = f"the split {split} is read" if splits.are_told else "all data is read"
    listed = [f"{name} ({_names(files)})" for name, files in left.items() if files]
    return f"{folder}: {what} ({_names(splits.files[split])}); left: {', '.join(listed)}"


def _names(files: Collection[PurePath]) -> str:
    more = f" and {len(files) - _NAMED} more" if len(files) > _NAMED else ""
    return ", ".join(str(file) for file in islice(files, _NAMED)) + more


@functools.cache  # a start looks for its data several times
def _say(line: str) -> None:
    logger.info("%s", line)

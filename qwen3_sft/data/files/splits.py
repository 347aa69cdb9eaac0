"""Which split a file of a folder belongs to, by the hub's rules, and which split is taken.

The hub's order of rules and its patterns are those of `datasets.data_files`: shards
(`data/NAME-00000-of-00003.parquet`), else folders' names, else files' names, else all is `train`.
Ours are stricter where theirs would train what is named for a test: upper case counts too, and
what lies in a train folder under another split's name is that split's.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePath

from qwen3_sft.errors import DataError

TRAIN, VALIDATION, TEST = "train", "validation", "test"


@dataclass(frozen=True, slots=True)
class Splits:
    """The files of a folder by split.

    Attributes:
        files: by the split's name, each in the order given.
        unnamed: files whose names tell no split although others' do; the hub leaves them out.
        are_told: whether names tell the splits; else all is `train`.
    """

    files: dict[str, list[PurePath]]
    unnamed: list[PurePath]
    are_told: bool


def splits_of(files: Collection[PurePath], folder: Path) -> Splits:
    """Sort files, given relative to their folder, into splits.

    Raises:
        DataError: a name tells two splits.
    """
    if of_shards := {file: split for file in files if (split := _split_of_shard(file))}:
        return _grouped(files, of_shards)
    of_files = {file: _told_by(file, "FILENAME") for file in files}
    of_folders = {file: _told_by(file, "DIR_NAME") for file in files}
    if any(len(told) == 1 for told in of_folders.values()):
        clear = {file: told for file, told in of_folders.items() if len(told) == 1}
        return _grouped(files, {file: _stricter(clear[file], of_files[file]) for file in clear})
    told = of_files if any(of_files.values()) else of_folders
    for file, splits in told.items():
        if len(splits) > 1:
            raise DataError(
                f"{folder / file}: its name tells the splits {' and '.join(sorted(splits))}: "
                "rename it, or name the files to read instead of their folder"
            )
    if any(told.values()):
        return _grouped(files, {file: next(iter(told[file])) for file in files if told[file]})
    return Splits({TRAIN: list(files)}, [], are_told=False)


def _grouped(files: Iterable[PurePath], split_of: dict[PurePath, str]) -> Splits:
    grouped: dict[str, list[PurePath]] = {}
    unnamed = []
    for file in files:
        if file in split_of:
            grouped.setdefault(split_of[file], []).append(file)
        else:
            unnamed.append(file)
    return Splits(grouped, unnamed, are_told=True)


def _stricter(by_folder: set[str], by_name: set[str]) -> str:
    """Return the folder's split, unless that is train and the file's name tells another."""
    (split,) = by_folder
    return next(iter(by_name)) if split == TRAIN and len(by_name) == 1 else split


def _split_of_shard(file: PurePath) -> str | None:
    from datasets.data_files import SPLIT_PATTERN_SHARDED

    if not re.match(glob_regex(SPLIT_PATTERN_SHARDED.replace("{split}", "*")), file.as_posix()):
        return None
    return file.name.rpartition("-of-")[0].rpartition("-")[0]


def _told_by(file: PurePath, what: str) -> set[str]:
    """Return the splits that the names in a path tell: FILENAME or DIR_NAME."""
    from datasets import data_files

    by_split = getattr(data_files, f"DEFAULT_PATTERNS_SPLIT_IN_{what}")
    name = file.as_posix().lower()
    return {
        str(split)
        for split, patterns in by_split.items()
        if any(re.match(glob_regex(pattern), name) for pattern in patterns)
    }


@functools.cache
def glob_regex(pattern: str) -> str:
    """Return the regular expression of a path's pattern, as `datasets` understands it."""
    from fsspec.utils import glob_translate

    return glob_translate(pattern)


def choose_split(there: Collection[str], asked: str | None) -> str | None:
    """Return the split to read under the name that it has there; None if it is not there.

    Args:
        there: the names of the splits.
        asked: a name, or another word for it as on the hub (`dev` for `validation`); None asks
            for what is there to evaluate on: validation, else test.
    """
    if asked in there:
        return asked
    wanted = (VALIDATION, TEST) if asked is None else (usual_name(asked),)
    found = (name for want in wanted for name in there if usual_name(name) == want)
    return next(found, None)


def usual_name(split: str) -> str:
    """Return `train`, `validation` or `test` for the other words that the hub has for them."""
    from datasets.data_files import SPLIT_KEYWORDS

    words = {word: str(usual) for usual, words in SPLIT_KEYWORDS.items() for word in words}
    return words.get(split.lower(), split)

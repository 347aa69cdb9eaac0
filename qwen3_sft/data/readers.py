"""Where rows come from: files, folders, saved datasets and hub ids, each row with its location.

A source is read as a stream, in a fixed order, and can say which content it has (`identity`)
without being read row by row. Locations are `file:line` for JSON and `file:row N` (from 1) for
tables and hub data.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from qwen3_sft.data.files.compressed import kind_of
from qwen3_sft.data.files.file_kinds import KINDS, FileOptions, file_rows, is_data_file
from qwen3_sft.data.files.folders import folder_files, saved_split
from qwen3_sft.data.json_rows import Row
from qwen3_sft.data.tally import Tally
from qwen3_sft.errors import DataError, said, told_as

if TYPE_CHECKING:
    from qwen3_sft.options.data_args import DataArguments


Digest = Callable[[Path], str]  # content hash of a file


class RowSource(Protocol):
    """A stream of rows of one format."""

    @property
    def name(self) -> str:
        """What the report calls it."""
        ...

    def rows(self, tally: Tally) -> Iterator[Row]:
        """Yield (location, row); what is skipped is counted in `tally`."""
        ...

    def identity(self, digest: Digest) -> str:
        """Return a string that changes whenever the rows may have."""
        ...


def find_sources(args: DataArguments, *, eval: bool = False) -> list[RowSource]:
    """Resolve `dataset` (or `eval_dataset`) to readable sources, folders to their files.

    A hub id or a folder may name its split after a colon (`org/name:test`). Otherwise
    `dataset_split` decides for `dataset`; of `eval_dataset` folders give validation, else test.

    Raises:
        DataError: if nothing is given, or a path does not exist or holds no data.
    """
    option, names = ("eval_dataset", args.eval_dataset) if eval else ("dataset", args.dataset)
    if not names:
        raise DataError(f"no data: set --{option} to files, folders or hub ids")
    return [source for name in names for source in _find(name, args, eval=eval)]


def check_sources(args: DataArguments) -> None:
    """Look for all data, read none: that for evaluation would be missed hours later.

    Raises:
        DataError: as of `find_sources`.
    """
    find_sources(args)
    if args.eval_dataset:
        find_sources(args, eval=True)


def _find(name: str, args: DataArguments, *, eval: bool) -> list[RowSource]:
    path = Path(name)
    options = FileOptions(args.on_bad_row == "drop", args.txt_rows)
    asked = None if eval else args.dataset_split
    if path.is_file():
        return [_FileSource(path, options)]
    if path.is_dir():
        return _folder_sources(path, asked, args.dataset_config, options)
    base, colon, split = name.rpartition(":")
    if colon and Path(base).is_dir():
        return _folder_sources(Path(base), split, args.dataset_config, options)
    if path.is_symlink() or path.exists():
        raise DataError(f"{name}: neither a file nor a folder, but a pipe, device or broken link")
    hub_id, split = (base, split) if colon else (name, asked)
    if not _looks_like_hub_id(hub_id):
        raise DataError(f"{name}: no such file or folder{_suggestion(path)}")
    if split is None:
        raise DataError(
            f"{name}: which split of this hub dataset? Name it behind a colon: "
            f"--eval_dataset {name}:validation"
        )
    return [_HubSource(hub_id, split, args.dataset_config, args.dataset_revision, args.streaming)]


def _looks_like_hub_id(name: str) -> bool:
    if is_data_file(Path(name)) or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        return False
    return "/" not in name or not Path(name.split("/")[0]).is_dir()


def _suggestion(path: Path) -> str:
    """Return "; did you mean X?" for the nearest name beside the first missing part of a path."""
    missing = path.absolute()
    while not missing.parent.is_dir():
        missing = missing.parent
    names = [entry.name for entry in missing.parent.iterdir()]
    near = difflib.get_close_matches(missing.name, names, n=1, cutoff=0.5)
    return f"; did you mean {missing.parent / near[0]}?" if near else ""


def _folder_sources(
    folder: Path, asked: str | None, config: str | None, options: FileOptions
) -> list[RowSource]:
    """Return the sources of a split; None asks for what there is to evaluate on."""
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(entry.parent.name for entry in folder.glob("*/state.json"))
        return [_SavedSource(folder / saved_split(folder, splits, asked))]
    if (folder / "state.json").is_file():
        _check_saved_split(folder, asked)
        return [_SavedSource(folder)]
    files = folder_files(folder, asked, config, _is_data, kinds=", ".join(KINDS))
    return [_FileSource(path, options) for path in files]


def _is_data(path: Path) -> bool:
    """Whether a file among others holds rows; a text among data is a notice, unless it is named."""
    return is_data_file(path) and kind_of(path)[0] != ".txt"


def _check_saved_split(folder: Path, asked: str | None) -> None:
    """Refuse a saved dataset that was taken from another split than the one asked for."""
    where = f"{folder}: cannot read this saved dataset"
    with told_as(DataError, where, OSError, ValueError, AttributeError):
        split = json.loads((folder / "state.json").read_text(encoding="utf-8")).get("_split")
    if asked is not None and split is not None:
        saved_split(folder, [split], asked)


@dataclass(frozen=True)
class _FileSource:
    path: Path
    options: FileOptions

    @property
    def name(self) -> str:
        return str(self.path)

    def rows(self, tally: Tally) -> Iterator[Row]:
        """Yield the rows of a file by its ending."""
        with told_as(DataError, self.path, OSError):
            yield from file_rows(self.path, tally, self.options)

    def identity(self, digest: Digest) -> str:
        with told_as(DataError, self.path, OSError):
            return f"{''.join(self.path.suffixes[-2:])} {digest(self.path)}"


@dataclass(frozen=True)
class _SavedSource:
    """A folder written by `datasets.Dataset.save_to_disk`."""

    path: Path

    @property
    def name(self) -> str:
        return str(self.path)

    def rows(self, tally: Tally) -> Iterator[Row]:
        from datasets import load_from_disk
        from pyarrow import ArrowException

        where = f"{self.path}: cannot read this saved dataset"
        # What its JSON files hold is checked nowhere.
        damage = (OSError, ArrowException, ValueError, TypeError, LookupError, AttributeError)
        with told_as(DataError, where, *damage):
            dataset = load_from_disk(str(self.path)).with_format(None)
        yield from _numbered(self.name, dataset)

    def identity(self, digest: Digest) -> str:
        return " ".join(digest(path) for path in sorted(self.path.glob("*")) if path.is_file())


@dataclass(frozen=True)
class _HubSource:
    hub_id: str
    split: str
    config: str | None
    revision: str | None
    streaming: bool

    @property
    def name(self) -> str:
        return f"{self.hub_id}:{self.split}"

    @functools.cached_property
    def dataset(self) -> Any:
        """The dataset as `datasets` loads it; a dataset script is refused there."""
        from datasets import load_dataset

        try:
            return load_dataset(
                self.hub_id,
                self.config,
                split=self.split,
                revision=self.revision,
                streaming=self.streaming,
            )
        except (OSError, ValueError, RuntimeError, *_errors_of_datasets()) as error:
            raise DataError(
                f"{self.name}: neither a file or folder here nor a dataset that loads from the "
                f"hub: {said(error)}{_suggestion(Path(self.hub_id))}"
            ) from error

    def rows(self, tally: Tally) -> Iterator[Row]:
        return _numbered(self.name, self.dataset)

    def identity(self, digest: Digest) -> str:
        if not self.streaming:
            return str(self.dataset._fingerprint)
        from huggingface_hub import HfApi

        try:
            info = HfApi().dataset_info(self.hub_id, revision=self.revision)
        except OSError as error:
            raise DataError(f"{self.name}: the hub does not answer: {said(error)}") from error
        return f"{info.sha} {self.config}"


def _numbered(name: str, rows: Any) -> Iterator[Row]:
    """Yield the rows of a dataset; its files are read, and fetched, as it goes on."""
    number = 0
    iterator = iter(rows)
    while True:
        number += 1
        where = f"{name}:row {number}"
        with told_as(DataError, where, OSError, ValueError, *_errors_of_datasets()):
            row = next(iterator, None)
        if row is None:
            return
        yield where, row


def _errors_of_datasets() -> tuple[type[Exception], ...]:
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError  # of the httpx that it uses
    from pyarrow import ArrowException

    return DatasetsError, ArrowException, HTTPError

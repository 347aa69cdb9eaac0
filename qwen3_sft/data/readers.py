"""Where rows come from: files, folders, saved datasets and hub ids, each row with its location.

A source is read as a stream, in a fixed order, and can say which content it has (`identity`)
without being read row by row. Locations are `file:line` for JSON and `file:row N` (from 1) for
tables and hub data.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from qwen3_sft.data.files.compressed import kind_of
from qwen3_sft.data.files.datasets_rows import Digest, HubSource, SavedSource
from qwen3_sft.data.files.file_kinds import KINDS, FileOptions, file_rows, is_data_file
from qwen3_sft.data.files.folders import folder_files, saved_split
from qwen3_sft.data.files.line_ranges import LineRange, line_ranges
from qwen3_sft.data.files.splits import TRAIN
from qwen3_sft.data.json_rows import Row, is_one_per_line
from qwen3_sft.data.tally import Tally
from qwen3_sft.errors import DataError, told_as
from qwen3_sft.options.data_entries import DataEntry, read_entries

if TYPE_CHECKING:
    from qwen3_sft.options.data_args import DataArguments


_LINES = ((".jsonl", ""), (".ndjson", ""))  # plain files of one row a line


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


@dataclass(frozen=True)
class EntrySource:
    """A source, and the entry of a mixture that it belongs to.

    Attributes:
        reader: of its rows.
        entry: with the format and the columns that count for it.
        number: of the entry, from 0.
        split: that was asked for; None for evaluation.
    """

    reader: RowSource
    entry: DataEntry
    number: int
    split: str | None = None

    @property
    def name(self) -> str:
        """What the report calls it."""
        return self.reader.name


def _entries(args: DataArguments, *, eval: bool = False) -> list[DataEntry]:
    """Return the entries of `dataset` (or `eval_dataset`), with what counts for each.

    Raises:
        UsageError: an entry says what cannot be.
    """
    option, texts = ("eval_dataset", args.eval_dataset) if eval else ("dataset", args.dataset)
    return [
        replace(
            entry,
            name=entry.name or args.dataset_config,
            format=entry.format or args.dataset_format,
            columns=tuple(args.columns) if entry.columns is None else entry.columns,
        )
        for entry in read_entries(texts, f"--{option}")
    ]


def find_sources(args: DataArguments, *, eval: bool = False) -> list[EntrySource]:
    """Resolve `dataset` (or `eval_dataset`) to readable sources, folders to their files.

    A hub id or a folder may name its split after a colon (`org/name:test`). Otherwise its entry's
    `split`, else `dataset_split` decides for `dataset`; of `eval_dataset` folders give validation,
    else test.

    Raises:
        DataError: if nothing is given, or a path does not exist or holds no data.
        UsageError: an entry says what cannot be.
    """
    entries = _entries(args, eval=eval)
    if not entries:
        option = "eval_dataset" if eval else "dataset"
        raise DataError(f"no data: set --{option} to files, folders or hub ids")
    _refuse_idle_options(args)
    return [
        EntrySource(reader, entry, number, None if eval else entry.split or args.dataset_split)
        for number, entry in enumerate(entries)
        for reader in _find(entry, args, eval=eval)
    ]


def entries_of(sources: Iterable[EntrySource]) -> list[DataEntry]:
    """Return the entries that sources belong to, each once; none is without a source."""
    return list({source.number: source.entry for source in sources}.values())


def check_sources(args: DataArguments) -> None:
    """Look for all data, read none: that for evaluation would be missed hours later.

    Raises:
        DataError: as of `find_sources`.
    """
    find_sources(args)
    if args.eval_dataset:
        find_sources(args, eval=True)


def _find(entry: DataEntry, args: DataArguments, *, eval: bool) -> list[RowSource]:
    name, path = entry.path, Path(entry.path)
    options = FileOptions(args.on_bad_row == "drop", args.txt_rows)
    asked = entry.split or (None if eval else args.dataset_split)
    if path.is_file():
        _refuse_parts_of_file(entry, args)
        return [FileSource(path, options)]
    if path.is_dir():
        return _folder_sources(path, asked, entry.name, options)
    base, colon, split = name.rpartition(":")
    if colon and Path(base).is_dir():
        return _folder_sources(Path(base), split, entry.name, options)
    if path.is_symlink() or path.exists():
        raise DataError(f"{name}: neither a file nor a folder, but a pipe, device or broken link")
    hub_id, split = (base, split) if colon else (name, asked)
    if "://" in name:
        raise DataError(f"{name}: an address is not read; download the file and name it")
    if not _looks_like_hub_id(hub_id):
        raise DataError(f"{name}: no such file or folder{_suggestion(path)}")
    if split is None:
        raise DataError(
            f"{name}: which split of this hub dataset? Name it behind a colon: "
            f"--eval_dataset {name}:validation"
        )
    return [
        HubSource(
            hub_id,
            split,
            entry.name,
            args.dataset_revision,
            args.streaming,
            _suggestion(Path(hub_id)),
        )
    ]


def _refuse_idle_options(args: DataArguments) -> None:
    """Refuse options that no source of this run has a use for.

    Raises:
        DataError: names the option.
    """
    entries = _entries(args) + _entries(args, eval=True)
    is_of_files = all(Path(entry.path).is_file() for entry in entries)
    is_local = all(Path(_base(entry.path)).exists() for entry in entries)
    for name, value, is_idle, needs in (
        ("dataset_split", args.dataset_split != TRAIN, is_of_files, "a folder or hub id"),
        ("dataset_config", args.dataset_config is not None, is_of_files, "a folder or hub id"),
        ("dataset_revision", args.dataset_revision is not None, is_local, "a hub id"),
        ("streaming", args.streaming, is_local, "a hub id"),
    ):
        if value and is_idle:
            raise DataError(
                f"--{name} {getattr(args, name)}: only {needs} has one, and all data is "
                f"{'files' if is_of_files else 'on this machine'}; leave it out"
            )


def _base(name: str) -> str:
    """Return a path without the split behind its colon."""
    base, _, _ = name.rpartition(":")
    return name if Path(name).exists() or not base else base


def _refuse_parts_of_file(entry: DataEntry, args: DataArguments) -> None:
    """Refuse to ignore what an entry says of a file that has neither splits nor configurations."""
    for key, value in (("split", entry.split), ("name", entry.name)):
        if value is not None and value != args.dataset_config:
            raise DataError(f"{entry.path}: a file has no {key} {value!r}; leave {key} out")


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
    is_saved = any((folder / f"{kind}.json").is_file() for kind in ("dataset_dict", "state"))
    if is_saved and config is not None:
        raise DataError(
            f"{folder}: a saved dataset has no configuration {config!r}; leave the entry's name, "
            "or --dataset_config, out"
        )
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(entry.parent.name for entry in folder.glob("*/state.json"))
        return [SavedSource(folder / saved_split(folder, splits, asked))]
    if (folder / "state.json").is_file():
        _check_saved_split(folder, asked)
        return [SavedSource(folder)]
    files = folder_files(folder, asked, config, _is_data, kinds=", ".join(KINDS))
    return [FileSource(path, options) for path in files]


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
class FileSource:
    """The rows of one file."""

    path: Path
    options: FileOptions

    @property
    def name(self) -> str:
        """What the report calls it."""
        return str(self.path)

    def ranges(self, skip: int, limit: int | None, tally: Tally) -> Iterator[LineRange] | None:
        """Return stretches for other processes to read, as `line_ranges`; None if it has none."""
        with told_as(DataError, self.path, OSError):
            if kind_of(self.path) not in _LINES or not is_one_per_line(self.path):
                return None
        return line_ranges(self.path, skip, limit, tally)

    def rows(self, tally: Tally) -> Iterator[Row]:
        """Yield the rows of a file by its ending."""
        with told_as(DataError, self.path, OSError):
            yield from file_rows(self.path, tally, self.options)

    def identity(self, digest: Digest) -> str:
        """Return the hash of the file, with its ending, which decides how it is read."""
        with told_as(DataError, self.path, OSError):
            return f"{''.join(self.path.suffixes[-2:])} {digest(self.path)}"

"""Rows that the `datasets` library reads: from the hub, or saved by it to a folder."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3_sft.data.json_rows import Row
from qwen3_sft.data.tally import Tally
from qwen3_sft.errors import DataError, said, told_as

Digest = Callable[[Path], str]  # content hash of a file


@dataclass(frozen=True)
class SavedSource:
    """A folder written by `datasets.Dataset.save_to_disk`; a `RowSource`."""

    path: Path

    @property
    def name(self) -> str:
        """What the report calls it."""
        return str(self.path)

    def rows(self, tally: Tally) -> Iterator[Row]:
        """Yield the rows with their number."""
        from datasets import load_from_disk
        from pyarrow import ArrowException

        where = f"{self.path}: cannot read this saved dataset"
        # What its JSON files hold is checked nowhere.
        damage = (OSError, ArrowException, ValueError, TypeError, LookupError, AttributeError)
        with told_as(DataError, where, *damage):
            dataset = load_from_disk(str(self.path)).with_format(None)
        yield from _numbered(self.name, dataset)

    def identity(self, digest: Digest) -> str:
        """Return the hashes of its files."""
        return " ".join(digest(path) for path in sorted(self.path.glob("*")) if path.is_file())


@dataclass(frozen=True)
class HubSource:
    """A split of a dataset on the hub; a `RowSource`."""

    hub_id: str
    split: str
    config: str | None
    revision: str | None
    streaming: bool
    hint: str  # what a missing file may have been

    @property
    def name(self) -> str:
        """What the report calls it."""
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
                f"hub: {said(error)}{self.hint}"
            ) from error

    def rows(self, tally: Tally) -> Iterator[Row]:
        """Yield the rows with their number."""
        return _numbered(self.name, self.dataset)

    def identity(self, digest: Digest) -> str:
        """Return the fingerprint of what was loaded, or of what would be streamed."""
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

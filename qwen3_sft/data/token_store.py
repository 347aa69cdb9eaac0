"""Tokenised samples on disk: three flat arrays per folder, read through memory maps.

`ids.npy` (n,) int32 and `trained.npy` (n,) bool hold all samples end to end; `offsets.npy` (s + 1,)
int64 says where each starts; `rows.npy` (s,) int64 which input row it came from; `report.json` is
the data report. A folder appears by one rename, so that it is whole or absent.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from qwen3_sft.errors import DataError

_DTYPES = {"ids": np.int32, "trained": np.bool_, "offsets": np.int64, "rows": np.int64}


class TokenDataset:
    """Samples as (input ids (n,) int32, trained (n,) bool); a view of some or all of a folder.

    Pickling carries the folder's name and the view's indices, never the tokens.

    Attributes:
        report: the data report, of the whole folder.
        lengths: tokens of each sample, (s,) int64.
    """

    def __init__(
        self, folder: Path, indices: np.ndarray | None = None, report: dict[str, Any] | None = None
    ) -> None:
        self.folder = folder
        if report is None:
            report = json.loads((folder / "report.json").read_text("utf-8"))
        self.report: dict[str, Any] = report
        arrays = {name: _open(folder / f"{name}.npy") for name in _DTYPES}
        self._ids, self._trained = arrays["ids"], arrays["trained"]
        self._indices = indices
        starts, ends = arrays["offsets"][:-1], arrays["offsets"][1:]
        whole = slice(None)
        self._starts = starts[whole if indices is None else indices]
        self._ends = ends[whole if indices is None else indices]
        self._rows = arrays["rows"][whole if indices is None else indices]
        self.lengths = self._ends - self._starts

    def __reduce__(self) -> tuple[type[TokenDataset], tuple[Path, np.ndarray | None]]:
        return TokenDataset, (self.folder, self._indices)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        start, end = self._starts[index], self._ends[index]
        return self._ids[start:end], self._trained[start:end]

    def split(self, eval_fraction: float, seed: int) -> tuple[TokenDataset, TokenDataset]:
        """Return (train, eval) views; samples of one input row stay on the same side.

        Args:
            eval_fraction: share of the input rows held out, above 0 and at most 0.5.
            seed: decides which rows; the same seed gives the same split.

        Raises:
            DataError: if one side would be empty.
            ValueError: if the fraction is out of range.
        """
        if not 0 < eval_fraction <= 0.5:
            raise ValueError(f"eval_fraction is {eval_fraction}; set it above 0 and up to 0.5")
        rows = np.unique(self._rows)
        num_eval = round(eval_fraction * len(rows))
        if not 0 < num_eval < len(rows):
            raise DataError(
                f"{self.report['files'][0]}: eval_fraction {eval_fraction} of {len(rows)} rows "
                f"leaves {num_eval} for evaluation and {len(rows) - num_eval} for training: "
                "give more data, a larger --eval_fraction or an --eval_dataset"
            )
        held_out = np.random.default_rng(seed).permutation(rows)[:num_eval]
        is_eval = np.isin(self._rows, held_out)
        return self._view(np.flatnonzero(~is_eval)), self._view(np.flatnonzero(is_eval))

    def _view(self, indices: np.ndarray) -> TokenDataset:
        chosen = indices if self._indices is None else self._indices[indices]
        return TokenDataset(self.folder, chosen, self.report)

    @property
    def source_of(self) -> np.ndarray:
        """The entry of the mixture that each sample comes from, (s,) int64."""
        return entry_of(self._rows, [source["first_row"] for source in self.report["sources"]])

    def by_source(self) -> dict[str, TokenDataset]:
        """Return a view of each source that has samples, by its name."""
        source_of = self.source_of
        views = {
            source["source"]: self._view(np.flatnonzero(source_of == number))
            for number, source in enumerate(self.report["sources"])
        }
        return {name: view for name, view in views.items() if len(view)}


def entry_of(rows: np.ndarray, first_rows: Sequence[int]) -> np.ndarray:
    """Return the entry that each row belongs to.

    Args:
        rows: (s,) int64, numbers over all entries.
        first_rows: of the entries, ascending; equal where an entry is empty.

    Returns:
        (s,) int64.
    """
    return np.searchsorted(first_rows, rows, side="right") - 1


def _open(path: Path) -> np.ndarray:
    """Map a file; a plain ndarray is sliced several times faster than np.memmap."""
    if path.stat().st_size == _HEADER_SIZE:  # an empty array cannot be mapped
        return np.load(path)
    return np.asarray(np.load(path, mmap_mode="r"))


@dataclass(frozen=True, slots=True, eq=False)
class PackedSamples:
    """Samples that lie end to end.

    Attributes:
        ids: (n,) int32.
        trained: (n,) bool.
        lengths: (s,) int64, adding up to n.
        rows: (s,) int64, the input row of each sample.
        labels: (s,) int64, how many tokens of each are trained.
    """

    ids: np.ndarray
    trained: np.ndarray
    lengths: np.ndarray
    rows: np.ndarray
    labels: np.ndarray


class TokenWriter:
    """Write a token folder sample by sample, in constant memory.

    Use it as a context manager; the folder is whole after `finish`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokens = 0
        self._stack = ExitStack()

    def __enter__(self) -> TokenWriter:
        self._arrays = {
            name: self._stack.enter_context(_GrowingArray(self.folder / f"{name}.npy", dtype))
            for name, dtype in _DTYPES.items()
        }
        self._arrays["offsets"].append(np.zeros(1, np.int64))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def append(self, samples: PackedSamples) -> None:
        """Add samples."""
        self._arrays["ids"].append(samples.ids)
        self._arrays["trained"].append(samples.trained)
        self._arrays["offsets"].append(self.tokens + np.cumsum(samples.lengths))
        self._arrays["rows"].append(samples.rows)
        self.tokens += len(samples.ids)

    def finish(self, report: dict[str, Any]) -> None:
        """Write the report and force everything to the disk."""
        for array in self._arrays.values():
            array.finish()
        with (self.folder / "report.json").open("w", encoding="utf-8") as file:
            json.dump(report, file, ensure_ascii=False, indent=1)
            file.flush()
            os.fsync(file.fileno())


_HEADER_SIZE = 128  # of a one-dimensional .npy file; numpy pads it so that the length may grow


class _GrowingArray:
    """A one-dimensional .npy file whose length is filled in at the end."""

    def __init__(self, path: Path, dtype: type) -> None:
        self.path = path
        self.dtype = np.dtype(dtype)
        self.length = 0

    def __enter__(self) -> _GrowingArray:
        self._file: BinaryIO = self.path.open("wb")
        self._write_header()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def append(self, values: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(values, self.dtype).data)
        self.length += len(values)

    def finish(self) -> None:
        self._file.seek(0)
        self._write_header()
        self._file.flush()
        os.fsync(self._file.fileno())

    def _write_header(self) -> None:
        description = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self._file, description)
        assert self._file.tell() == _HEADER_SIZE, "numpy changed the header; move the data start"

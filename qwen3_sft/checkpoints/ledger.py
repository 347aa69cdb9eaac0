"""Files that are hashed while they are written, so that nobody has to read them again for it.

Each process of a save keeps a `Ledger` and writes its files through it. A disk that is full fails
no write: the ledger keeps the first error, frees the room and drops the rest. A process that raised
in the middle of a collective save would leave the others in it; instead all of them reach its end,
where the errors are compared.
"""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypedDict

import xxhash

# Bytes hashed and then written: few enough to stay in a core's cache between the two.
_BLOCK = 1 << 20


class Entry(TypedDict):
    """What a manifest says of one file: its size and its xxh3 hash of 128 bits, in hex."""

    bytes: int
    xxh3: str


class Ledger:
    """What one process has written of one save.

    Attributes:
        folder: of the save; the names of the entries are relative to it.
        entries: of the files that are written, flushed to disk and closed.
        error: the first that a disk gave; once there is one nothing more is written.
    """

    def __init__(self, folder: Path) -> None:
        """Begin with no file."""
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        self.error: BaseException | None = None

    @property
    def failure(self) -> str | None:
        """The error in words, None without one."""
        return None if self.error is None else f"{type(self.error).__name__}: {self.error}"

    def open(self, path: str | os.PathLike[str]) -> HashedFile:
        """Open a new file below `folder`, to be written from its first byte to its last."""
        return HashedFile(self, Path(path))

    def record(self, path: Path) -> None:
        """Enter a (small) file that something else has written: read it and flush it to disk.

        Raises:
            OSError: it cannot be read.
        """
        with path.open("rb") as file:
            os.fsync(file.fileno())
        self.entries[self.name(path)] = {"bytes": path.stat().st_size, "xxh3": hash_file(path)}

    def rename(self, path: Path, new: Path) -> None:
        """Give an entered file another name below `folder`.

        Raises:
            OSError: it cannot be renamed.
        """
        if self.error is None:
            path.rename(new)
            self.entries[self.name(new)] = self.entries.pop(self.name(path))

    def name(self, path: Path) -> str:
        """Return a path as the manifest names it."""
        return Path(os.path.abspath(path)).relative_to(os.path.abspath(self.folder)).as_posix()

    def fail(self, error: BaseException) -> None:
        """Keep the first error."""
        self.error = self.error or error


class HashedFile:
    """A binary file that is written once, in order; entered in its ledger when it is closed.

    Each block is hashed by the thread that writes it, just before: nothing is copied, and the
    caller may change its buffer afterwards. xxh3 is so much faster than a copy into the page cache
    that handing blocks to another thread gains nothing (figures: `bench/checkpoint.py`).
    """

    def __init__(self, ledger: Ledger, path: Path) -> None:
        """Create the file, in place of one that is there."""
        self._ledger, self._path = ledger, path
        self._digest = xxhash.xxh3_128()
        self._size = 0
        self._small = bytearray()  # of writes that are too short to be worth a system call
        self._file: io.FileIO | None = None
        self.closed = False
        if ledger.error is None:
            try:
                self._file = path.open("wb", buffering=0)
            except OSError as error:
                ledger.fail(error)

    def write(self, data: Any) -> int:
        """Write and hash; return the number of bytes.

        Args:
            data: any contiguous buffer.

        Raises:
            ValueError: the file is closed.
        """
        if self.closed:
            raise ValueError(f"{self._path}: is closed")
        view = memoryview(data).cast("B")
        try:
            if view.nbytes < _BLOCK:
                self._small += view
                if len(self._small) >= _BLOCK:
                    self._write_small()
            else:
                self._write_small()
                for start in range(0, view.nbytes, _BLOCK):
                    self._write_block(view[start : start + _BLOCK])
        except OSError as error:
            self._give_up(error)
        self._size += view.nbytes
        return view.nbytes

    def _write_small(self) -> None:
        small, self._small = self._small, bytearray()
        self._write_block(memoryview(small))

    def _write_block(self, block: memoryview) -> None:
        if self._file is None or self._ledger.error is not None:
            return
        self._digest.update(block)
        while block:
            block = block[self._file.write(block) :]

    def close(self) -> None:
        """Flush to disk and enter the file in the ledger."""
        if self.closed:
            return
        self.closed = True
        try:
            self._write_small()
            if self._file is not None:
                os.fsync(self._file.fileno())
                self._file.close()  # a network file system may only now say that it is full
        except OSError as error:
            self._give_up(error)
        if self._ledger.error is None:
            entry: Entry = {"bytes": self._size, "xxh3": self._digest.hexdigest()}
            self._ledger.entries[self._ledger.name(self._path)] = entry
        else:
            self._abandon()

    def _give_up(self, error: OSError) -> None:
        """Keep the error, and give the room back: others have small files to write yet."""
        if error.filename is None and error.errno is not None:
            error = OSError(error.errno, error.strerror, str(self._path))
        self._ledger.fail(error)
        with contextlib.suppress(OSError):
            os.truncate(self._path, 0)

    def _abandon(self) -> None:
        self.closed = True
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close; a file whose writer has raised is not entered."""
        if kind is None:
            self.close()
        else:
            self._abandon()

    def tell(self) -> int:
        """Return the number of bytes written so far."""
        return self._size

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go nowhere: only where the file already is.

        Raises:
            UnsupportedOperation: elsewhere; what is hashed cannot be written again.
        """
        target = {os.SEEK_SET: 0, os.SEEK_CUR: self._size, os.SEEK_END: self._size}[whence] + offset
        if target != self._size:
            raise io.UnsupportedOperation(f"{self._path}: is written in order, no seek to {target}")
        return target

    def flush(self) -> None:
        """Do nothing; `close` flushes to disk."""

    def fileno(self) -> int:
        """Refuse: what went directly to the file would miss in the hash.

        Raises:
            UnsupportedOperation: always.
        """
        raise io.UnsupportedOperation(f"{self._path}: writes go through its hash")

    def writable(self) -> bool:
        """Say that it can be written."""
        return True

    def readable(self) -> bool:
        """Say that it cannot be read."""
        return False

    def seekable(self) -> bool:
        """Say that it is written in order."""
        return False


def hash_file(path: Path) -> str:
    """Read a file and return its xxh3 hash.

    Raises:
        OSError: it cannot be read.
    """
    digest = xxhash.xxh3_128()
    block = memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()

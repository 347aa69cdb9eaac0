"""Files as they lie on disk, compressed or not."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from pathlib import Path
from typing import IO, Any

from qwen3_sft.errors import DataError

COMPRESSED = (".gz", ".zst", ".bz2", ".xz")


def kind_of(path: Path) -> tuple[str, str]:
    """Return the endings of a file in lower case: of its kind, and of its compression or ""."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSED:
        return (suffixes[-2] if len(suffixes) > 1 else ""), suffixes[-1]
    return (suffixes[-1] if suffixes else ""), ""


def open_bytes(path: Path) -> IO[bytes]:
    """Open a file for reading its bytes, decompressed by its ending.

    Raises:
        DataError: reading meets a file that is damaged or not what its ending says.
    """
    compression = kind_of(path)[1]
    if not compression:
        return path.open("rb")
    return io.BufferedReader(_Decompressed(path, compression), 1 << 20)


class _Decompressed(io.RawIOBase):
    """The bytes of a compressed file; what its decoder raises becomes a DataError."""

    def __init__(self, path: Path, compression: str) -> None:
        self._path = path
        self._file = _decoder(path, compression)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._file.read(len(buffer))
        except (OSError, EOFError, ValueError, lzma.LZMAError) as error:
            raise DataError(f"{self._path}: cannot be decompressed: {error}") from error
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _decoder(path: Path, compression: str) -> Any:
    if compression == ".gz":
        return gzip.open(path, "rb")
    if compression == ".bz2":
        return bz2.open(path, "rb")
    if compression == ".xz":
        return lzma.open(path, "rb")
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")

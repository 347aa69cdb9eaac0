"""The memory of this process over time: what it owns, and what it only maps from files."""

from __future__ import annotations

import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
INTERVAL_S = 0.002


@dataclass(frozen=True)
class Resident:
    """Bytes in physical memory.

    Attributes:
        anonymous: the process's own, shared memory included; only it can free them.
        file: pages of mapped files, which the kernel drops when it needs the room.
        peak: the most that both were together, as the kernel counted it since `reset_peak`.
    """

    anonymous: int
    file: int
    peak: int

    @classmethod
    def parse(cls, status: str) -> Resident:
        """Read the text of /proc/PID/status."""
        fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        kib = {name: int(fields[name].split()[0]) for name in _FIELDS}
        return cls(
            anonymous=1024 * (kib["RssAnon"] + kib["RssShmem"]),
            file=1024 * kib["RssFile"],
            peak=1024 * kib["VmHWM"],
        )

    @classmethod
    def now(cls) -> Resident:
        """Return that of this process."""
        return cls.parse(STATUS.read_text(encoding="ascii"))


_FIELDS = ("RssAnon", "RssShmem", "RssFile", "VmHWM")


@dataclass
class Growth:
    """Bytes that came on top of what there was at the start.

    Attributes:
        anonymous: at the worst moment, see `Resident`.
        file: at the worst moment, which may be another.
        total: both together at the worst moment, sampled.
        total_by_kernel: the same from VmHWM, which misses nothing.
        anonymous_after: what was left at the end.
        file_after: likewise.
        seconds: between start and end.
        samples: taken in that time.
    """

    anonymous: int = 0
    file: int = 0
    total: int = 0
    total_by_kernel: int = 0
    anonymous_after: int = 0
    file_after: int = 0
    seconds: float = 0.0
    samples: int = 0

    def as_json(self) -> dict[str, float]:
        """Return the fields."""
        return asdict(self)


class PeakMemory:
    """Sample this process's memory inside a `with`, in a thread; `growth` holds the result.

    Args:
        start: what counts as zero; by default what there is when the `with` begins.
    """

    def __init__(self, start: Resident | None = None) -> None:
        self.growth = Growth()
        self.start = start or Resident.now()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Self:
        """Begin."""
        CLEAR_REFS.write_text("5", encoding="ascii")  # VmHWM starts anew
        self._began = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop and read what is left."""
        self._done.set()
        self._thread.join()
        end = self._add(Resident.now())
        growth, start = self.growth, self.start
        growth.anonymous_after = end.anonymous - start.anonymous
        growth.file_after = end.file - start.file
        growth.total_by_kernel = end.peak - start.anonymous - start.file
        growth.seconds = time.perf_counter() - self._began

    def _sample(self) -> None:
        while not self._done.wait(INTERVAL_S):
            self._add(Resident.now())

    def _add(self, now: Resident) -> Resident:
        growth, start = self.growth, self.start
        anonymous, file = now.anonymous - start.anonymous, now.file - start.file
        growth.anonymous = max(growth.anonymous, anonymous)
        growth.file = max(growth.file, file)
        growth.total = max(growth.total, anonymous + file)
        growth.samples += 1
        return now

"""One run or export at a time writes into a folder: a file says which process of which host.

No lock of the kernel: not every shared file system has them, and children that outlive a killed
process would hold them. Processes are told by host name, id and start time, so containers that
share a host name but not their processes are not told apart.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from qwen3_sft.errors import UsageError, said
from qwen3_sft.records.ownership import mark_run, refuse_foreign_export
from qwen3_sft.records.run_folder import RunFolder

logger = logging.getLogger(__name__)

_LOCK = ".qwen3_sft-lock"
# A clock that is set moves the start times that the system tells.
_CLOCK_S = 60.0
# A lock that is just being written is empty for a moment.
_PATIENCE_S, _POLL_S = 2.0, 0.05


@dataclass(frozen=True)
class Holder:
    """A process.

    Attributes:
        host: its name.
        process: the id.
        started: seconds since 1970; ids are used again.
    """

    host: str
    process: int
    started: float

    @classmethod
    def me(cls) -> Holder:
        """Return this process."""
        return cls(socket.gethostname(), os.getpid(), psutil.Process().create_time())

    def is_dead(self) -> bool:
        """Whether it is known to have ended; of another host nothing is known."""
        if self.host != socket.gethostname():
            return False
        try:
            process = psutil.Process(self.process)
            is_another = process.create_time() > self.started + _CLOCK_S
            return is_another or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True


def lock_inside(folder: Path) -> Path:
    """Return the lock of a run folder."""
    return folder / _LOCK


def lock_beside(folder: Path) -> Path:
    """Return the lock of a folder that is replaced as a whole, by whatever name it is called."""
    real = folder.resolve()
    return real.with_name(f".{real.name}{_LOCK}")


@contextmanager
def claimed(folder: RunFolder) -> Iterator[None]:
    """Make a run's folder, and keep others out of it; the first of all ranks does so for the rest.

    Raises:
        UsageError: it cannot be made or written to, somebody works in it, or what lies in its
            model's place is not ours.
    """
    folder.create()
    if int(os.environ.get("RANK", "0")):
        yield
        return
    with held(lock_inside(folder.path), folder.path), held(lock_beside(folder.model), folder.model):
        refuse_foreign_export(folder.model)
        mark_run(folder.path)
        yield


@contextmanager
def held(lock: Path, folder: Path) -> Iterator[None]:
    """Hold a lock; within another one of the same process nothing is done.

    A process that was killed leaves its lock, which the next one on its host takes over.

    Raises:
        UsageError: another process holds it, or it cannot be written.
    """
    me = Holder.me()
    try:
        is_taken = _take(lock, folder, me)
    except OSError as error:
        raise UsageError(f"{folder}: cannot be locked ({lock}: {said(error)})") from error
    try:
        yield
    finally:
        if is_taken:
            _release(lock, me)


def _take(lock: Path, folder: Path, me: Holder) -> bool:
    """Return whether the lock was taken, and is not held already."""
    end = time.monotonic() + _PATIENCE_S
    while not _create(lock, me):
        holder = _read(lock)
        if holder == me:
            return False
        if holder is not None:
            if not holder.is_dead():
                raise UsageError(_in_use(lock, folder, holder))
            if _take_over(lock, holder, me):
                logger.warning(
                    "%s: process %d, which worked in it, has ended; its lock is taken over",
                    folder, holder.process,
                )  # fmt: skip
                return True
        if time.monotonic() > end:
            raise UsageError(
                f"{folder}: {lock} is no lock that can be read; if nobody works there, remove it"
            )
        time.sleep(_POLL_S)
    return True


def _in_use(lock: Path, folder: Path, holder: Holder) -> str:
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder.started))
    who = f"process {holder.process} on {holder.host}, started {since}"
    text = f"{folder} is in use by {who}: wait for its end, or choose another folder"
    if holder.host != socket.gethostname():
        return f"{text}. This is {socket.gethostname()}: if {who}, has ended, remove {lock}"
    return text


def _create(path: Path, me: Holder) -> bool:
    """Make a file that names this process, if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("x", encoding="utf-8") as file:
            try:
                json.dump(asdict(me), file)
                file.flush()
            except OSError:
                path.unlink()
                raise
    except FileExistsError:
        return False
    return True


def _read(path: Path) -> Holder | None:
    """Return who holds a lock; None if it is being written, is gone, or is none of ours."""
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _take_over(lock: Path, dead: Holder, me: Holder) -> bool:
    """Put this process in a dead one's place, unless another process is doing or has done so."""
    claim = lock.with_name(f"{lock.name}-after-{dead.process}")
    if not _create(claim, me):
        return False
    if _read(lock) != dead:
        claim.unlink()
        return False
    claim.replace(lock)
    return True


def _release(lock: Path, me: Holder) -> None:
    try:
        if _read(lock) == me:
            lock.unlink()
    except OSError as error:  # read-only by now; this process will have ended when it is read
        logger.warning("%s could not be removed: %s", lock, error)

"""Every exception of ours, the exit code it ends a program with, and the one place that catches it.

A mistake of the user's and a failure that we foresaw become a message without a traceback. Whatever
else is raised passes with its traceback: it is a bug, here or in a library.
"""

from __future__ import annotations

import errno
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# What interrupts a run: its checkpoint is written at the step's end.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

DONE = 0
FAILED = 1
MISTAKE = 2
DOES_NOT_FIT = 3
INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h, "try again"
BY_SIGNAL = 128  # and the signal's number, as shells have it


STOPPED = "stopped by Ctrl-C"

_READABLE = 500  # characters of a message that is not ours

# What the machine refuses, whatever a program does: no bug, though nobody has foreseen the place.
_MISTAKES = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.EISDIR,
    errno.ENOTDIR,
)  # fmt: skip
_LACKS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE, errno.EMFILE)


class SftError(Exception):
    """What went wrong inside a run and was foreseen; exit code 1.

    Attributes:
        exit_code: of the program that it ends.
    """

    exit_code = FAILED

    def line(self) -> str:
        """Return the message as it is printed."""
        return f"{type(self).__name__}: {self}"


class UserError(SftError, ValueError):
    """A mistake of the user's; exit code 2."""

    exit_code = MISTAKE

    def line(self) -> str:
        """Return the message as it is printed."""
        return f"error: {self}"


class UsageError(UserError):
    """A mistake in a recipe, on the command line or in a variable of the environment."""


class DataError(UserError):
    """A row that cannot be trained on; the message begins with its location.

    It takes the whole message as its only argument, so that it survives the pickling between a
    worker process and its parent.
    """


class WorkerError(SftError, RuntimeError):
    """A process that tokenises was killed, or ended by itself; the message says how."""


class ModelError(UserError):
    """The model at hand cannot be trained; the message says why and what to set."""


class DoesNotFitError(SftError, RuntimeError):
    """The plan needs more memory than a GPU has; exit code 3."""

    exit_code = DOES_NOT_FIT

    def line(self) -> str:
        """Return the message as it is printed."""
        return str(self)


class CheckpointError(SftError, RuntimeError):
    """A checkpoint is incomplete, damaged or does not fit; the message names the file."""


class ExportError(SftError, RuntimeError):
    """The exported folder does not reproduce the trained model; it was not published."""


class UploadError(SftError, RuntimeError):
    """The verified export did not reach the hub; the message says how to send it."""


class GpuMemoryError(SftError, RuntimeError):
    """Memory ran out; the message names what was being done, who holds it and what to set."""


class LeakError(SftError, RuntimeError):
    """Packed documents influence each other with this attention implementation."""


class NonFiniteError(SftError, RuntimeError):
    """Too many steps in a row had a NaN or Inf loss or gradient."""


class ProcessGroupError(SftError, RuntimeError):
    """The other processes did not come; the message says who waited where and for how long."""


class FlopsError(SftError, ValueError):
    """The FLOPs of a config or batch cannot be counted as asked; the message says why."""


class RefusedPickleError(SftError):
    """The pickle would import something unexpected, or is malformed or too large."""


class Interrupted(Exception):  # noqa: N818 - no error: the run is saved and goes on later
    """A signal has ended training, and a checkpoint of its last step is written."""


def exit_code_of(
    work: Callable[[], int], report: Callable[[str], object], also: tuple[type[Exception], ...] = ()
) -> int:
    """Return what `work` returns, or the exit code of the error that ended it.

    Args:
        work: a program.
        report: takes the message of an error, one text.
        also: errors of other packages that are foreseen as well; exit code 1.
    """
    try:
        return work()
    except SftError as error:
        report(error.line())
        return error.exit_code
    except also as error:
        report(f"{type(error).__name__}: {error}")
        return FAILED
    except OSError as error:
        if error.errno not in _MISTAKES + _LACKS:
            raise
        where = "" if error.filename is None else f"{error.filename}: "
        report(f"error: {where}{said(error)}")
        return MISTAKE if error.errno in _MISTAKES else FAILED


def unless_stopped(work: Callable[[], int], report: Callable[[str], object]) -> int:
    """Return what `work`, the whole of a program, returns; on Ctrl-C the code that shells have.

    Args:
        work: a program, with its imports.
        report: takes the one line that says so.
    """
    try:
        return work()
    except KeyboardInterrupt:
        # What follows is the end of the process: a second one shall cut that short, not trace it.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        report(STOPPED)
        return BY_SIGNAL + signal.SIGINT


def said(error: Exception) -> str:
    """Return the message of somebody else's error, cut to a readable length, without a number."""
    words = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(words.split())[:_READABLE] or type(error).__name__


@contextmanager
def told_as(kind: type[SftError], where: object, *foreign: type[Exception]) -> Iterator[None]:
    """Turn errors that a library raises about something of the user's into ours, which name it.

    Args:
        kind: of the new error.
        where: the file, folder or name at fault.
        foreign: what the library raises; errors of ours pass.
    """
    try:
        yield
    except SftError:
        raise
    except foreign as error:
        raise kind(f"{where}: {said(error)}") from error

"""Every exception of ours, the exit code it ends a program with, and the one place that catches it.

A mistake of the user's and a failure that we foresaw become a message without a traceback. Whatever
else is raised passes with its traceback: it is a bug, here or in a library.
"""

from __future__ import annotations

import signal
from collections.abc import Callable

# What interrupts a run: its checkpoint is written at the step's end.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

DONE = 0
FAILED = 1
MISTAKE = 2
DOES_NOT_FIT = 3
INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h, "try again"
BY_SIGNAL = 128  # and the signal's number, as shells have it


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

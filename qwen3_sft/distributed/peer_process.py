"""What the kernel knows of a process on this host: there, gone, or stopped.

Asked of /proc, so the answer does not depend on the process having time for one: it may hold
Python's lock in a long call, or wait for a disk.
"""

from __future__ import annotations

import enum
import os
import signal
import socket
from dataclasses import dataclass
from pathlib import Path


class State(enum.Enum):
    """What a process can be; what is traced by a debugger, or waits for a disk, is alive."""

    ALIVE = "alive"
    STOPPED = "stopped"
    GONE = "gone"


@dataclass(frozen=True)
class ProcessId:
    """A process by a name that is never given again.

    Attributes:
        pid: its number, which the kernel gives to others after its end.
        start: when it started, in clock ticks since the host's start (/proc/PID/stat, field 22).
    """

    pid: int
    start: int

    def state(self) -> State:
        """Ask the kernel now; a process that nobody has waited for yet is gone as well."""
        found = _read_stat(self.pid)
        if found is None or found[1] != self.start or found[0] in "ZXx":
            return State.GONE
        return State.STOPPED if found[0] == "T" else State.ALIVE

    def kill(self) -> None:
        """Send it SIGKILL, which ends a stopped process too; nothing happens if it is gone."""
        try:
            handle = os.pidfd_open(self.pid)  # from here on the number cannot change hands
        except ProcessLookupError:
            return
        try:
            if self.state() is not State.GONE:
                signal.pidfd_send_signal(handle, signal.SIGKILL)
        finally:
            os.close(handle)


def process_id(pid: int) -> ProcessId:
    """Return the process that has this number now.

    Raises:
        ProcessLookupError: there is none.
    """
    found = _read_stat(pid)
    if found is None:
        raise ProcessLookupError(f"/proc knows no process {pid}")
    return ProcessId(pid, found[1])


def host_id() -> str:
    """Return what two processes share exactly if they see each other by number in /proc.

    Containers of one host have numbers of their own, and cloned machines share their boot id.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # then nobody is a neighbour
        return f"{socket.gethostname()} {os.urandom(16).hex()}"


def _read_stat(pid: int) -> tuple[str, int] | None:
    """Return state and start of a process, None if there is none of this number."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()  # its name may hold spaces and brackets
    return fields[0], int(fields[19])

"""What the ranks of a run tell each other beside their collectives: a board in the store.

A thread of its own does all the talking, because a call to a store whose host is stopped does not
return (TCPStore of torch 2.13: its timeout covers waiting for a key, not for an answer). Everybody
else writes and reads fields, which never waits.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from dataclasses import dataclass, field

import torch.distributed as dist

from qwen3_sft.distributed.peer_process import ProcessId, host_id, process_id

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Peer:
    """Another rank on this host, and what it last said.

    Attributes:
        rank: its rank.
        process: where to look for it.
        step: the step it finished last; None before training.
        has_ended: it said that it ends, well or not: it must not be missed.
    """

    rank: int
    process: ProcessId
    step: int | None
    has_ended: bool


@dataclass(frozen=True)
class Failure:
    """The first rank that failed by itself, the step it had finished, and its exception."""

    rank: int
    step: int | None
    error: str


@dataclass(frozen=True)
class View:
    """The board as it was read last.

    Attributes:
        number: counts the readings.
        peers: the other ranks of this host.
        num_ended: ranks of the run that said that they end.
        num_failed: those of them that said so with an exception of their own.
        verdict: what ends the run, found by whatever rank; None while nothing is wrong.
        failure: the first that failed by itself.
    """

    number: int = 0
    peers: list[Peer] = field(default_factory=list)
    num_ended: int = 0
    num_failed: int = 0
    verdict: str | None = None
    failure: Failure | None = None


class PeerBoard:
    """Write `step`, `verdict` and `end()`; read `view`. One exchange with the store per period."""

    def __init__(self, store: dist.Store, rank: int, period_s: float) -> None:
        """Connect and put this rank on the board; the talking begins with `start`.

        Args:
            store: of the process group, reached by all ranks. The board talks over a connection of
                its own: a wait of the group's would block it.
            rank: of this process.
            period_s: seconds between two exchanges.
        """
        self._server = store  # may be the one that all others talk to
        self._store = dist.PrefixStore("peers", store.clone())  # type: ignore[missing-attribute]
        self._rank, self._period_s = rank, period_s
        self._host = f"host/{host_id()}"
        self.step: int | None = None
        self.verdict: str | None = None
        self.view = View()
        self.begun = 0  # exchanges that have begun; a view of a higher number is news
        self.has_said_end = self.is_lost = False
        self._end: dict[str, str | int | None] | None = None
        self._sent: set[str] = set()
        self._sent_step: int | None = None
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._talk, name="peer-board", daemon=True)

    def start(self) -> None:
        """Begin to talk."""
        self._thread.start()

    def end(self, error: str | None) -> None:
        """Say that this process ends: with `error`, or well."""
        self._end = {"rank": self._rank, "step": self.step, "error": error}
        self.hurry()

    def hurry(self) -> None:
        """Have the next exchange now."""
        self._wake.set()

    def close(self) -> None:
        """Stop talking; returns after a second even if the store never answers."""
        self._stop.set()
        self._wake.set()
        self._thread.join(timeout=1)

    def _talk(self) -> None:
        try:
            self._introduce()
            while not self._stop.is_set():
                self.begun += 1
                self._write()
                self.view = self._read(self.begun)
                self._wake.wait(self._period_s)
                self._wake.clear()
        except dist.DistError as error:  # a broken connection is not mended; the view stays old
            self.is_lost = True
            if not self.has_said_end:  # later on its owner may leave
                logger.warning("the store of the process group is lost: %s", error)

    def _introduce(self) -> None:
        self._store.set(f"step/{self._rank}", "null")
        self._store.set(f"end/{self._rank}", "")
        process = process_id(os.getpid())
        line = json.dumps([self._rank, process.pid, process.start])
        self._store.append(self._host, f"{line}\n")  # type: ignore[missing-attribute]

    def _write(self) -> None:
        """Send what has changed; that this process ends comes last."""
        if (step := self.step) != self._sent_step:
            self._store.set(f"step/{self._rank}", json.dumps(step))
            self._sent_step = step
        if (verdict := self.verdict) and self._is_new("verdict"):
            self._store.compare_set("verdict", "", verdict)
        if (end := self._end) and self._is_new("end"):
            if end["error"] is not None:
                self._store.compare_set("failure", "", json.dumps(end))
                self._store.add("num_failed", 1)
            self._store.set(f"end/{self._rank}", json.dumps(end))
            self._store.add("num_ended", 1)
            self.has_said_end = True

    def _is_new(self, name: str) -> bool:
        is_new = name not in self._sent
        self._sent.add(name)
        return is_new

    def _read(self, number: int) -> View:
        failure = self._get("failure")
        return View(
            number=number,
            peers=self._peers(),
            num_ended=self._store.add("num_ended", 0),
            num_failed=self._store.add("num_failed", 0),
            verdict=self._get("verdict"),
            failure=None if failure is None else Failure(**json.loads(failure)),
        )

    def _peers(self) -> list[Peer]:
        entries = map(json.loads, self._store.get(self._host).decode().splitlines())
        others = [entry for entry in entries if entry[0] != self._rank]
        keys = [f"{kind}/{entry[0]}" for entry in others for kind in ("step", "end")]
        values = self._store.multi_get(keys) if keys else []
        return [
            Peer(rank, ProcessId(pid, start), step=json.loads(step), has_ended=bool(end))
            for (rank, pid, start), step, end in zip(others, values[::2], values[1::2], strict=True)
        ]

    def _get(self, key: str) -> str | None:
        return self._store.get(key).decode() if self._store.check([key]) else None

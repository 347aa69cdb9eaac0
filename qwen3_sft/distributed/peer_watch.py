"""A rank that is dead, stopped or has failed ends the run on all ranks, and is named.

Left alone the others wait in their next collective until its timeout, half an hour by default, and
then tell of the timeout. So a thread in every rank looks once a second at the other ranks on its
host: as the kernel sees them, since a heartbeat would miss a beat, and give a false alarm, whenever
a long call holds Python's lock. What it finds goes to all hosts through the store.

Not seen are a node or a network that is lost, and a rank that hangs but runs: these end by the
timeout of collectives (--dist_timeout_s). A process that dies alone on its host closes its
connections, which gloo reports at once; otherwise its launcher and that timeout have to do.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Self

import torch.distributed as dist

from qwen3_sft.distributed.peer_board import Failure, Peer, PeerBoard
from qwen3_sft.distributed.peer_process import State
from qwen3_sft.errors import FAILED

logger = logging.getLogger(__name__)

_PERIOD_S = 1.0
# Patience is counted in looks, not in seconds: then time in which this process was stopped itself,
# or had no turn, is nobody's fault.
_STOPPED_LOOKS = 10
_UNANSWERED_LOOKS = 5
_STORE_LOOKS = 120  # an outage of the network that gradients do not take is no reason to end
# A failure of all ranks together is raised by each of them, and this rank has so long to do so.
_FAILURE_LOOKS = 3
# How long a rank that fails waits for all others to end, or for the cause to be found elsewhere.
_CAUSE_S = 6.0
# Rank 0, which may hold the store, leaves last, and lets others read what it says last.
_FAREWELL_S = 30.0
_LAST_WORD_S = 3.0
# A log whose reader has stopped takes no lines.
_LOG_S = 3.0
_ENDS = (
    "All ranks end now. The last checkpoint is whole: after the cause is mended the same command "
    "goes on from it"
)


class PeerWatch:
    """Watch the other ranks from `start` to the end of the `with` block, or to `leave`."""

    def __init__(self, period_s: float = _PERIOD_S) -> None:
        """Watch nobody yet.

        Args:
            period_s: seconds between two looks.
        """
        self._period_s = period_s
        self._rank, self._world_size = 0, 1
        self._board: PeerBoard | None = None
        self._stop = threading.Event()
        self._is_ending = False
        self._stopped, self._gone = Counter[int](), Counter[int]()
        self._begun_when_gone: dict[int, int] = {}
        self._silent = self._failed = 0
        self._last_number = 0

    def start(self, store: dist.Store, rank: int, world_size: int) -> None:
        """Begin to watch; the ranks see each other from about a second later on.

        Args:
            store: what `join_process_group` returns.
            rank: of this process.
            world_size: number of processes.
        """
        self._rank, self._world_size = rank, world_size
        self._board = PeerBoard(store, rank, self._period_s)
        self._board.start()
        threading.Thread(target=self._watch, name="peer-watch", daemon=True).start()

    def step(self, step: int) -> None:
        """Say which optimizer step this rank has finished; costs nothing."""
        if self._board is not None:
            self._board.step = step

    def leave(self) -> None:
        """Say that this rank ends well, and stop watching; before the process group is left."""
        if self._board is None:
            return
        board, self._is_ending = self._board, True
        if self._rank:
            self._stop.set()  # rank 0 may be gone, and the store with it, before this returns
        board.end(None)
        if self._rank == 0:
            _wait(_FAREWELL_S, board, self._all_have_ended)
        else:
            _wait(_CAUSE_S, board, lambda: board.is_lost or board.has_said_end)
        self._close()

    def __enter__(self) -> Self:
        """Return the watch; it begins with `start`."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leave; after an exception tell the others, and wait for the cause if it is elsewhere.

        That another process has closed its connection is what a dead rank looks like from here:
        the watching thread has the time to name it, and then ends this process. The launcher's
        SIGTERM, which comes a tenth of a second after a rank's death, must not be quicker.
        """
        if error is None or self._board is None:
            self.leave()
            return
        self._is_ending = True
        former = signal.signal(signal.SIGTERM, signal.SIG_IGN)
        board, text = self._board, f"{type(error).__name__}: {str(error)[:2000]}"
        board.end(text)
        _wait(_CAUSE_S, board, self._all_have_ended)
        first = board.view.failure or Failure(self._rank, board.step, text)
        if board.view.num_failed < self._world_size or first.error != text:
            logger.error("%s", describe_failure(first))
        self._close()
        signal.signal(signal.SIGTERM, signal.SIG_DFL if former is None else former)

    def _all_have_ended(self) -> bool:
        return self._board is not None and self._board.view.num_ended >= self._world_size

    def _close(self) -> None:
        self._stop.set()
        if self._board is not None:
            self._board.close()
            self._board = None

    def _watch(self) -> None:
        board = self._board
        assert board is not None
        while not self._stop.wait(self._period_s):
            if finding := self.look(board):
                self._end(board, finding)

    def look(self, board: PeerBoard) -> str | None:
        """Look once at everybody; return what ends the run, None while nothing does."""
        view = board.view
        if view.verdict is not None:
            return view.verdict
        for peer in view.peers:
            if finding := self._look_at(peer, view.number, board):
                board.verdict = finding
                board.hurry()
                return finding
        if self._is_ending:
            return None
        self._failed += view.failure is not None
        if view.failure is not None and self._failed > _FAILURE_LOOKS:
            return describe_failure(view.failure)
        self._silent = self._silent + 1 if view.number == self._last_number else 0
        self._last_number = view.number
        if self._silent >= _STORE_LOOKS:
            return _describe_lost_store(self._silent * self._period_s)
        return None

    def _look_at(self, peer: Peer, number: int, board: PeerBoard) -> str | None:
        if peer.has_ended:
            return None
        state, rank = peer.process.state(), peer.rank
        self._stopped[rank] = self._stopped[rank] + 1 if state is State.STOPPED else 0
        # Ranks keep step with one another, and what this one did is newer than what it read.
        step = max((s for s in (peer.step, board.step) if s is not None), default=None)
        if self._stopped[rank] >= _STOPPED_LOOKS:
            return _describe_stopped(peer, step, _STOPPED_LOOKS * self._period_s)
        if state is not State.GONE:
            return None
        # It may have said goodbye since the board was read: only a later reading proves it did not.
        begun = self._begun_when_gone.setdefault(rank, board.begun)
        self._gone[rank] += 1
        if number > begun:
            return _describe_gone(peer, step, has_store=True)
        is_late = board.is_lost or self._gone[rank] > _UNANSWERED_LOOKS
        return _describe_gone(peer, step, has_store=False) if is_late else None

    def _end(self, board: PeerBoard, finding: str) -> None:
        """End this process; its main thread may wait in a collective for another half an hour."""
        # It may also hold the lock of the log's handler.
        saying = threading.Thread(target=logger.error, args=("%s", finding), daemon=True)
        saying.start()
        saying.join(_LOG_S)
        board.end(None)
        _wait(_LAST_WORD_S, board, lambda: bool(self._rank) and board.has_said_end)
        for peer in board.view.peers:
            # A launcher's SIGTERM would not reach it.
            if self._stopped[peer.rank] >= _STOPPED_LOOKS:
                peer.process.kill()
        os._exit(FAILED)


def _wait(limit_s: float, board: PeerBoard, is_done: Callable[[], bool]) -> None:
    end = time.monotonic() + limit_s
    while not is_done() and time.monotonic() < end:
        board.hurry()
        time.sleep(0.1)


def describe_failure(failure: Failure) -> str:
    """Return which rank failed by itself, after which step and how."""
    return f"rank {failure.rank} ended {_when(failure.step)}: {failure.error}. {_ENDS}"


def _describe_gone(peer: Peer, step: int | None, *, has_store: bool) -> str:
    host = socket.gethostname()
    lost = "" if has_store else ", and the store of the process group with it"
    return (
        f"rank {peer.rank} (process {peer.process.pid} on {host}) died {_when(step)} without a "
        f"word{lost}. If nobody killed it, look for the kernel's out-of-memory killer in `dmesg` "
        f"on {host} and for the last lines of rank {peer.rank} in the log. {_ENDS}"
    )


def _describe_stopped(peer: Peer, step: int | None, seconds: float) -> str:
    host, pid = socket.gethostname(), peer.process.pid
    return (
        f"rank {peer.rank} (process {pid} on {host}) has been stopped for {seconds:.0f} s "
        f"{_when(step)}: something sent it SIGSTOP or SIGTSTP, and no `kill -CONT {pid}` came. It "
        f"is killed now. {_ENDS}"
    )


def _describe_lost_store(seconds: float) -> str:
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    return (
        f"the store of the process group at {where} has not answered for {seconds:.0f} s: the "
        f"process that holds it has ended, or its host or the network to it is down. {_ENDS}"
    )


def _when(step: int | None) -> str:
    return "before training began" if step is None else f"after step {step}"

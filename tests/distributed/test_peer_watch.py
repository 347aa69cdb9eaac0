"""The watch over ranks: real child processes stand for the others, a real store lies between."""

import json
import os
import signal
import time
from datetime import timedelta
from functools import partial

import pytest
import torch.distributed as dist

from qwen3_sft.distributed import peer_watch as peers
from qwen3_sft.distributed.peer_board import PeerBoard
from qwen3_sft.distributed.peer_process import State, host_id, process_id
from qwen3_sft.distributed.peer_watch import PeerWatch
from tests.support.commands import wait_until

PERIOD_S = 0.02


@pytest.fixture
def store():
    return dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5)
    )


class OtherRank:
    """Rank 1 as the store knows it, by whatever process."""

    def __init__(self, store, pid, start):
        self.store = dist.PrefixStore("peers", store)
        self.store.set("step/1", "null")
        self.store.set("end/1", "")
        self.store.append(f"host/{host_id()}", f"{json.dumps([1, pid, start])}\n")

    def has_done(self, step):
        self.store.set("step/1", str(step))

    def ends(self, error=None):
        end = json.dumps({"rank": 1, "step": 7, "error": error})
        if error is not None:
            self.store.compare_set("failure", "", end)
            self.store.add("num_failed", 1)
        self.store.set("end/1", end)
        self.store.add("num_ended", 1)


class Watch:
    """Rank 0's watch, which looks when it is told to and ends nothing."""

    def __init__(self, store):
        self.watch = PeerWatch()
        self.board = PeerBoard(store, 0, PERIOD_S)
        self.board.start()

    def look(self, times=1, *, is_read=True):
        """Look so many times, each time at a board that was read anew."""
        found = None
        for _ in range(times):
            if is_read:
                wait_until(partial(self.is_read_after, self.board.begun))
            found = found or self.watch.look(self.board)
        return found

    def is_read_after(self, number):
        return self.board.view.number > number


@pytest.fixture
def watch(store):
    made = Watch(store)
    yield made
    made.board.close()


def other(store, process):
    return OtherRank(store, process.pid, process_id(process.pid).start)


def test_dead_rank(store, child, watch):
    rank = other(store, child)
    rank.has_done(17)
    assert watch.look(3) is None
    child.kill()
    wait_until(lambda: process_id(child.pid).state() is State.GONE)
    found = watch.look(2)
    assert found.startswith(f"rank 1 (process {child.pid} on ")
    assert "died after step 17 without a word" in found
    assert "`dmesg`" in found
    # What one rank finds all others read.
    wait_until(lambda: watch.board.view.verdict == found)


def test_own_step_is_newer_than_what_was_read(store, child, watch):
    other(store, child).has_done(17)
    watch.board.step = 18
    child.kill()
    assert "died after step 18" in watch.look(3)


def test_rank_that_has_ended_well_may_go(store, child, watch):
    rank = other(store, child)
    watch.look(2)
    rank.ends()
    child.kill()
    child.wait()
    assert watch.look(20) is None


def test_farewell_that_comes_after_the_last_reading(store, child, watch):
    """The process is gone, and the board was read before its last word: not yet dead."""
    rank = other(store, child)
    watch.look(2)
    watch.board.close()
    rank.ends()
    child.kill()
    child.wait()
    assert watch.look(3, is_read=False) is None


def test_stopped_rank(store, child, watch):
    other(store, child)
    child.send_signal(signal.SIGSTOP)
    wait_until(lambda: process_id(child.pid).state() is State.STOPPED)
    assert watch.look(9) is None
    found = watch.look()
    assert f"rank 1 (process {child.pid}" in found
    assert "has been stopped for 10 s before training began" in found


def test_rank_that_is_stopped_for_a_moment(store, child, watch):
    other(store, child)
    for _ in range(3):
        child.send_signal(signal.SIGSTOP)
        wait_until(lambda: process_id(child.pid).state() is State.STOPPED)
        assert watch.look(9) is None
        child.send_signal(signal.SIGCONT)
        wait_until(lambda: process_id(child.pid).state() is State.ALIVE)
        assert watch.look() is None


def test_failed_rank(store, child, watch):
    other(store, child).ends("DataError: rows.jsonl:3: no messages")
    assert watch.look(3) is None, "all ranks may be about to raise the same"
    found = watch.look()
    assert found.startswith("rank 1 ended after step 7: DataError: rows.jsonl:3: no messages. All")


def test_verdict_of_another_host(store, watch):
    dist.PrefixStore("peers", store).set("verdict", "rank 9 died")
    assert watch.look(2) == "rank 9 died"


def hold_store(port_written):
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.write(port_written, str(server.port).encode())
    time.sleep(600)


def test_store_that_is_lost_with_its_rank(capfd):
    """The connection breaks: the rank that held the store is named, not the store."""
    port_read, port_written = os.pipe()
    if (holder := os.fork()) == 0:
        hold_store(port_written)
    client = dist.TCPStore("127.0.0.1", int(os.read(port_read, 9)), is_master=False)
    watch = Watch(client)
    OtherRank(client, holder, process_id(holder).start)
    watch.look(2)
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    wait_until(lambda: watch.board.is_lost)
    found = watch.look(is_read=False)
    assert found.startswith(f"rank 1 (process {holder} ")
    assert "died before training began without a word, and the store" in found
    # Where that rank is on another host only the silence is seen.
    alone = PeerWatch()
    remote = PeerBoard.__new__(PeerBoard)
    remote.__dict__ |= watch.board.__dict__ | {"view": type(watch.board.view)(number=1)}
    assert not any(alone.look(remote) for _ in range(120))
    assert "has not answered for 120 s" in alone.look(remote)


# ---- the block ----


@pytest.fixture
def ends(monkeypatch):
    monkeypatch.setattr(peers, "_CAUSE_S", 0.3)
    monkeypatch.setattr(peers, "_FAREWELL_S", 0.3)


def test_two_ranks_that_end_well(store, ends):
    watches = [PeerWatch(PERIOD_S), PeerWatch(PERIOD_S)]
    for rank, watch in enumerate(watches):
        watch.start(store, rank, 2)
        watch.step(3)
    for watch in reversed(watches):
        with watch:
            pass
    board = dist.PrefixStore("peers", store)
    assert json.loads(board.get("end/1")) == {"rank": 1, "step": 3, "error": None}
    assert board.add("num_ended", 0) == 2
    assert not board.check(["failure"])


def test_failure_of_one_rank_is_told(store, ends, caplog):
    watch = PeerWatch(PERIOD_S)
    watch.start(store, 0, 2)
    watch.step(4)
    with pytest.raises(ValueError, match="row 5"), watch:
        raise ValueError("row 5")
    assert "rank 0 ended after step 4: ValueError: row 5. All ranks end" in caplog.text
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_failure_of_all_ranks_is_not_told_twice(store, child, ends, caplog):
    other(store, child).ends("ValueError: row 5")
    watch = PeerWatch(PERIOD_S)
    watch.start(store, 0, 2)
    began = time.monotonic()
    with pytest.raises(ValueError, match="row 5"), watch:
        raise ValueError("row 5")
    assert time.monotonic() - began < 0.3
    assert caplog.text == ""


def test_alone_there_is_nobody_to_watch():
    with PeerWatch() as watch:
        watch.step(1)
        watch.leave()

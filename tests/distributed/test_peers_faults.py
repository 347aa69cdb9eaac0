"""One rank of two is killed, stopped or fails: everything ends soon, with the rank and its step."""

import re

import pytest

from tests.distributed.rank_faults import ACCELERATE, TORCHRUN, start
from tests.support.commands import free_port
from tests.support.faults import outcome

pytestmark = pytest.mark.faults

LIMIT_S = 60


@outcome(
    "SIGKILL of one rank (the out-of-memory killer)",
    "the others name the rank, its process, host and last step, and end with exit code 1",
)
@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_killed_rank_is_named(tmp_path, launcher):
    with start(tmp_path, launcher=launcher) as hurt:
        hurt.wait_for_step(3)
        hurt.kill(1)
        ended(hurt, r"rank 1 \(process \d+ on \S+\) died after step (\d+) without a word")


@outcome(
    "SIGSTOP of one rank",
    "after 10 s without SIGCONT the others name it, kill it and end with exit code 1",
)
@pytest.mark.parametrize("rank", [0, 1])
def test_stopped_rank_is_named_and_killed(tmp_path, rank):
    with start(tmp_path) as hurt:
        hurt.wait_for_step(3)
        hurt.stop(rank)
        found = rf"rank {rank} \(process \d+ on \S+\) has been stopped for 10 s after step (\d+)"
        ended(hurt, found)


@outcome("the same for the rank that holds the store", "the same")
@pytest.mark.parametrize("fault", ["kill", "stop"])
def test_rank_that_holds_the_store_is_named(tmp_path, fault):
    with start(tmp_path, FAULTS_STORE_PORT=str(free_port())) as hurt:
        hurt.wait_for_step(3)
        getattr(hurt, fault)(0)
        found = r"rank 0 \(process \d+ on \S+\) (?:died|has been stopped for 10 s) after step (\d+)"
        ended(hurt, found)


@outcome(
    "an exception on one rank, such as damaged data",
    "all ranks tell whose it is, after which step and what it says, and end; exit code not 0",
)
def test_exception_on_one_rank_is_told_by_all(tmp_path):
    with start(tmp_path) as hurt:
        hurt.wait_for_step(3)
        hurt.spoil_data(1)
        told = r"rank 1 ended after step (\d+): IndexError: index out of range"
        ended(hurt, told)
        assert re.search(rf"^{told}", hurt.text(), re.MULTILINE), "rank 0 does not tell"
        assert re.search(rf"^\[rank 1\] {told}", hurt.text(), re.MULTILINE)


def ended(hurt, sentence):
    """The run ends in time with the sentence, whose group is the step recorded last."""
    code, seconds = hurt.end(LIMIT_S + 30)
    text = hurt.text()
    assert code != 0
    assert seconds < LIMIT_S, text[-8000:]
    found = re.search(sentence, text)
    assert found is not None, text[-8000:]
    assert abs(int(found[1]) - hurt.steps()) <= 1
    assert "The last checkpoint is whole" in text


@outcome(
    "a rank in a long call, or done seconds before another",
    "no alarm: the run goes on, exit code 0",
)
def test_busy_and_late_ranks_are_no_alarm(tmp_path):
    """A lock is held for longer than a stopped process is waited for; one rank leaves early."""
    port = str(free_port())
    slow = {"FAULTS_HOLD_LOCK_S": "15", "FAULTS_LEAVE_LATE_S": "4", "FAULTS_STORE_PORT": port}
    with start(tmp_path, "--max_steps", 3, **slow) as run:
        assert run.process.wait(timeout=240) == 0, run.text()[-8000:]
        assert run.steps() == 3
        assert "All ranks end now" not in run.text()
        assert "is lost" not in run.text()

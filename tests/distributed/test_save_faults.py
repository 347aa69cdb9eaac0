"""A rank dies while all write a checkpoint: the other ends, says who, and nothing is lost."""

import re
import signal

import pytest

from qwen3_sft.checkpoints.folders import STAGING
from tests.distributed import worker
from tests.distributed.test_engines import NATIVE, cases, exported  # noqa: F401
from tests.support.commands import free_port, metrics
from tests.support.faults import Blow, outcome
from tests.support.forked import run_ranks, start_ranks

pytestmark = pytest.mark.faults

ENGINES = {"ddp": (None,), "native": (None, *NATIVE), "zero2": ("zero2",)}
LIMIT_S = 60
FACTS = ("step", "loss", "grad_norm", "tokens_seen")


@outcome(
    "SIGKILL of one rank while all write a checkpoint (DDP, FSDP2, ZeRO-2)",
    "the other ends and names it; no such checkpoint; the same command goes on, exactly",
)
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_rank_is_killed_while_all_save(cases, engine, rank):  # noqa: F811
    cases.add("whole", *ENGINES[engine])
    cases.add("killed", *ENGINES[engine])
    whole, killed = cases.cases
    codes = run_ranks(2, worker.main, [whole], cases.root / "first", folder=cases.root / "first")
    assert codes.returncode == 0, codes.stdout + codes.stderr

    run, printed = cases.root / "killed", cases.root / "second"
    blow = Blow(run / STAGING / "checkpoint-4", after=run / "checkpoint-2", at=2)
    operations = cases.root / "operations"
    ranks = start_ranks(2, worker.run_and_fall, killed, rank, blow, operations, folder=printed)
    ranks[rank].join(120)
    assert ranks[rank].exitcode == -signal.SIGKILL, (printed / "out").read_text()
    other = ranks[1 - rank]
    other.join(LIMIT_S)
    words = (printed / "out").read_text() + (printed / "err").read_text()
    if other.exitcode is None:
        other.kill()
    assert other.exitcode == 1, words
    assert re.search(rf"rank {rank} \(process \d+ on \S+\) died after step 4", words), words
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-2"]

    again = cases.root / "third"
    codes = run_ranks(2, worker.main, [killed | {"port": free_port()}], again, folder=again)
    assert codes.returncode == 0, codes.stdout + codes.stderr
    assert f"resuming from {run / 'checkpoint-2'}" in codes.stdout
    expected = [[record[key] for key in FACTS] for record in metrics(cases.root / "whole")]
    assert [[record[key] for key in FACTS] for record in metrics(run)] == expected
    weights = exported(run)
    for name, tensor in exported(cases.root / "whole").items():
        assert weights[name].equal(tensor), name

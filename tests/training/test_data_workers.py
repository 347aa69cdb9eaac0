import os
import signal
import subprocess

import psutil
import pytest
from torch.utils.data import DataLoader

from qwen3_sft.launch.agent import SIGNALS
from qwen3_sft.training.interruption import let_workers_outlive_signals
from tests.support.commands import wait_until


def children():
    return {child.pid for child in psutil.Process().children()}


@pytest.fixture
def loader():
    loader = DataLoader(range(64), num_workers=2, worker_init_fn=seeded)
    let_workers_outlive_signals(loader)
    return loader


def seeded(worker_id):
    """What the trainer gives is still called."""
    os.environ["SEEDED"] = str(worker_id)


class Seeded:
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return os.environ["SEEDED"]


def sent(number, pids):
    """Send a signal from another process, as a scheduler does."""
    subprocess.run(["kill", f"-{number.value}", *map(str, pids)], check=True)


@pytest.mark.parametrize("number", SIGNALS)
def test_workers_go_on_when_others_signal_them(loader, number):
    before = children()
    batches = iter(loader)
    first = next(batches)
    workers = children() - before
    assert len(workers) == 2
    sent(number, workers)
    assert [first.item(), *(batch.item() for batch in batches)] == list(range(64))
    wait_until(lambda: not children() & workers)


def test_a_worker_is_deaf_from_its_first_moment_on(loader):
    """Before it runs any Python, too; the parent hears as before."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    before = children()
    batches = iter(loader)
    workers = children() - before
    sent(signal.SIGTERM, workers)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask
    assert [batch.item() for batch in batches] == list(range(64))


def test_the_parent_ends_them(loader):
    before = children()
    batches = iter(loader)
    next(batches)
    workers = [psutil.Process(pid) for pid in children() - before]
    for worker in workers:
        worker.send_signal(signal.SIGTERM)
    wait_until(lambda: {worker.status() for worker in workers} == {psutil.STATUS_ZOMBIE})
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        list(batches)


def test_the_former_init_is_called():
    loader = DataLoader(Seeded(), batch_size=None, num_workers=2, worker_init_fn=seeded)
    let_workers_outlive_signals(loader)
    assert list(loader) == ["0", "1", "0", "1"]


def test_without_workers_nothing_changes():
    loader = DataLoader(range(2), worker_init_fn=seeded)
    let_workers_outlive_signals(loader)
    assert loader.worker_init_fn is seeded

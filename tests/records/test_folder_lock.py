"""One process at a time writes into a folder, and a second one is told who."""

import json
import multiprocessing
import socket
import subprocess
import sys
import time

import psutil
import pytest

from qwen3_sft.errors import UsageError
from qwen3_sft.records import folder_lock
from qwen3_sft.records.folder_lock import Holder, claimed, held, lock_beside, lock_inside
from qwen3_sft.records.ownership import RUN_MARK
from qwen3_sft.records.run_folder import RunFolder

SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture
def other():
    """Another process that runs."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.wait()


def write(lock, **facts):
    me = Holder.me()
    known = {"host": me.host, "process": me.process, "started": me.started}
    lock.write_text(json.dumps(known | facts))


def holder(lock):
    return Holder(**json.loads(lock.read_text()))


def started(process):
    return psutil.Process(process.pid).create_time()


def test_a_lock_names_this_process_and_goes_with_it(tmp_path):
    lock = lock_inside(tmp_path)
    with held(lock, tmp_path):
        assert holder(lock) == Holder.me()
        with held(lock, tmp_path):  # a run's export
            pass
        assert lock.exists()
    with pytest.raises(RuntimeError), held(lock, tmp_path):
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_a_living_process_is_named(tmp_path, other):
    lock = lock_inside(tmp_path)
    write(lock, process=other.pid, started=started(other))
    before = lock.read_text()
    with pytest.raises(UsageError, match=rf"process {other.pid} on {socket.gethostname()}, start"):
        held(lock, tmp_path).__enter__()
    assert lock.read_text() == before


@pytest.mark.parametrize("fate", ["gone", "zombie", "id used again"])
def test_a_dead_process_of_this_host_is_followed(tmp_path, other, fate, caplog):
    lock = lock_inside(tmp_path)
    write(lock, process=other.pid, started=started(other) - 3600 * (fate == "id used again"))
    if fate != "id used again":
        other.kill()
        while psutil.Process(other.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        if fate == "gone":
            other.wait()
    with held(lock, tmp_path):
        assert holder(lock) == Holder.me()
    assert f"process {other.pid}, which worked in it, has ended" in caplog.text
    assert not list(tmp_path.iterdir())


def test_another_host_is_named_with_what_to_do(tmp_path):
    lock = lock_inside(tmp_path)
    write(lock, host="node17", process=1 << 30)
    with pytest.raises(UsageError, match=rf"on node17, .* has ended, remove {lock}"):
        held(lock, tmp_path).__enter__()
    assert holder(lock).host == "node17"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"host": "x"}'])
def test_what_is_no_lock_of_ours_is_not_overwritten(tmp_path, text, monkeypatch):
    monkeypatch.setattr(folder_lock, "_PATIENCE_S", 0.1)
    lock = lock_inside(tmp_path)
    lock.write_text(text)
    with pytest.raises(UsageError, match="no lock that can be read; if nobody works there"):
        held(lock, tmp_path).__enter__()
    assert lock.read_text() == text


def _take(folder, gate, results):
    gate.wait()
    try:
        with held(lock_inside(folder), folder):
            results.put("taken")
            gate.wait()
    except UsageError as error:
        results.put(str(error))
        gate.wait()


@pytest.mark.parametrize("stale", [False, True])
def test_of_several_at_once_one_gets_in(tmp_path, stale):
    number = 4
    if stale:
        write(lock_inside(tmp_path), process=1 << 30)
    gate, results = SPAWN.Barrier(number), SPAWN.Queue()
    processes = [SPAWN.Process(target=_take, args=(tmp_path, gate, results)) for _ in range(number)]
    for process in processes:
        process.start()
    found = sorted(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(60)
    assert found.count("taken") == 1
    assert sum("is in use by process" in text for text in found) == number - 1
    assert not list(tmp_path.iterdir())


def test_the_first_rank_claims_a_run_for_all(tmp_path, monkeypatch, other):
    run = RunFolder(tmp_path / "run")
    with claimed(run):
        assert (run.path / RUN_MARK).is_file()
        assert lock_beside(run.model).is_file()  # which keeps `qwen3-sft export` out
        write(lock_inside(run.path), process=other.pid, started=started(other))
        monkeypatch.setenv("RANK", "1")
        with claimed(run):
            pass
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(UsageError, match="in use"):
            claimed(run).__enter__()
    # Somebody has removed the lock and taken it: it is not ours to remove.
    assert {path.name for path in run.path.iterdir()} == {RUN_MARK, lock_inside(run.path).name}


def test_a_folder_has_one_lock_by_whatever_name(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to("model")
    monkeypatch.chdir(tmp_path / "model")
    names = [tmp_path / "model", tmp_path / "link", tmp_path / "x" / ".." / "model"]
    assert {lock_beside(path) for path in (*names, type(tmp_path)("."))} == {lock_beside(names[0])}
    assert lock_beside(names[0]).parent == tmp_path


def test_a_lock_that_cannot_be_written_is_a_mistake(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be locked"):
        held(lock_beside(tmp_path / "file" / "model"), tmp_path / "file" / "model").__enter__()

"""What is lost when a save, a disk or a file fails: nothing, or a sentence says what.

The run: 8 steps, checkpoints at 4 and 8. Each case is compared with `whole`, which nothing befell.
One case of each kind belongs to the default run, `-m faults` has all.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess

import pytest

from qwen3_sft.demo.model import write_checkpoint
from tests.support.commands import metrics
from tests.support.data_rows import sums
from tests.support.faults import Blow, outcome, start

pytestmark = pytest.mark.e2e

COMPARED = ("step", "loss", "grad_norm", "learning_rate", "tokens", "tokens_seen", "skipped_steps")
WEIGHTS = "model/model.safetensors"


@pytest.fixture(scope="session")
def site(tmp_path_factory, tokenizer):
    """Model, data and an uninterrupted run."""
    root = tmp_path_factory.mktemp("faults")
    write_checkpoint(root / "base", tokenizer)
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, sums(60))))
    return root


def rest(values):
    """Leave the first value to the default run and mark the others."""
    first, *others = values
    return [first, *(pytest.param(value, marks=pytest.mark.faults) for value in others)]


def options(site, **changed):
    words = {
        "model_name_or_path": site / "base", "dataset": site / "rows.jsonl", "max_length": 160,
        "max_steps": 8, "save_steps": 4, "learning_rate": "1e-3", "warmup_steps": 2,
        "global_batch_size": 2, "num_samples": 0, "data_cache_dir": site / "cache",
    }  # fmt: skip
    return [part for name, value in (words | changed).items() for part in (f"--{name}", value)]


@pytest.fixture(scope="session")
def whole(site):
    run = start(options(site), site / "whole")
    assert run.end() == 0, run.words
    return run.output


def records(folder):
    return [[record[key] for key in COMPARED] for record in metrics(folder)]


def goes_on(site, whole, output, expected, *, says=()):
    """Start again; the end must be that of `whole`."""
    run = start(options(site), output)
    assert run.end() == 0, run.words
    if expected is not None:
        assert f"resuming from {output}/checkpoint-{expected}" in run.words
    for sentence in says:
        assert sentence in run.words
    assert records(output) == records(whole)
    assert (output / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()


# ---- killed ----


@outcome("SIGKILL between two steps", "the same command goes on from the last checkpoint, exactly")
def test_killed_between_steps(site, whole, tmp_path):
    output = tmp_path / "run"
    # The eighth is where a record after the checkpoint's own is written.
    blow = Blow(output, after=output / "checkpoint-4", at=8)
    run = start(options(site), output, blow)
    assert run.end() == -signal.SIGKILL, run.words
    assert 4 < metrics(output)[-1]["step"] < 8
    goes_on(site, whole, output, 4)


@pytest.fixture(scope="session")
def operations(site, tmp_path_factory):
    """Every file operation in the run folder from the first checkpoint on."""
    folder = tmp_path_factory.mktemp("counted") / "run"
    run = start(options(site), folder, Blow(folder, after=folder / "checkpoint-4"))
    assert run.end() == 0, run.words
    lines = run.operations.read_text().splitlines()
    return [line.replace(str(folder), "") for line in lines]


@outcome(
    "SIGKILL at any file operation of a save",
    "the next start takes the newest whole checkpoint and says which it passed over; exact",
)
@pytest.mark.faults
@pytest.mark.parametrize("part", range(9))
def test_killed_at_every_file_operation_of_a_save(site, whole, operations, tmp_path, part):
    save = [i for i, line in enumerate(operations) if "checkpoint-8" in line]
    # Before each file that is touched for the first time, and before whatever moves or removes.
    boundaries = [
        i + 1
        for i in range(save[0], save[-1] + 2)
        if operations[i] not in operations[save[0] : i] or not operations[i].startswith("open")
    ]
    assert len(boundaries) > 15
    for at in boundaries[part::9]:
        output = tmp_path / str(at)
        run = start(options(site), output, Blow(output, after=output / "checkpoint-4", at=at))
        assert run.end() == -signal.SIGKILL, run.words
        is_published = (output / "checkpoint-8").exists()
        goes_on(site, whole, output, 8 if is_published else 4)
        assert not list(output.glob(".saving/*"))


@outcome(
    "SIGKILL inside a file of a save", "the same: a folder without its manifest is no checkpoint"
)
@pytest.mark.parametrize("share", rest([0.5, 0.001, 1.2, 1.9]))
def test_killed_inside_a_file(site, whole, tmp_path, share):
    """The optimizer's file is twice as large as the model's."""
    output = tmp_path / "run"
    size = (whole / "checkpoint-8" / "model.safetensors").stat().st_size
    blow = Blow(output, after=output / "checkpoint-4", max_bytes=int(share * size))
    run = start(options(site), output, blow)
    assert run.end() == -signal.SIGXFSZ, run.words
    goes_on(site, whole, output, 4)


# ---- damaged ----


def names(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def cut(file):
    os.truncate(file, file.stat().st_size // 2)


@outcome(
    "A file of the newest checkpoint is missing, cut or has one bit flipped",
    "found before step 1 and named; the checkpoint before it is taken, exact",
)
@pytest.mark.parametrize("damage", rest([flip, cut, os.unlink]))
def test_damaged_files(site, whole, tmp_path, damage):
    """All files are looked at; the run is started once, with all checkpoints' turn before it."""
    from qwen3_sft.checkpoints.folders import newest_verified

    files = names(whole / "checkpoint-8")
    assert len(files) > 8
    for file in files:
        output = tmp_path / file.replace("/", "_")
        for step in (4, 8):
            shutil.copytree(whole / f"checkpoint-{step}", output / f"checkpoint-{step}")
        damage(output / "checkpoint-8" / file)
        found, passed_over = newest_verified(output)
        assert found == output / "checkpoint-4", file
        assert len(passed_over) == 1
        assert file in passed_over[0]
    shutil.copy(whole / "metrics.jsonl", output / "metrics.jsonl")
    goes_on(site, whole, output, 4, says=["passed over a checkpoint"])


# ---- disks ----


@contextlib.contextmanager
def disk(folder, megabytes):
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def remount(folder, option):
    subprocess.run(["mount", "-o", f"remount,{option}", folder], check=True)


@outcome(
    "The disk is too small for the next checkpoint",
    "exit code 1 before a byte is written, with bytes needed and free; earlier ones are whole, and "
    "the same command goes on once there is room",
)
@pytest.mark.faults
def test_too_little_space(site, whole, tmp_path):
    size = sum(p.stat().st_size for p in (whole / "checkpoint-8").rglob("*")) / 2**20
    with disk(tmp_path / "disk", int(size * 1.5) + 80) as folder:
        run = start(options(site, save_total_limit=9), folder / "run")
        ballast = folder / "ballast"
        run.wait_for(4)
        end = run.process.exitcode
        if end is None and not (folder / "run" / "checkpoint-8").exists():
            ballast.write_bytes(bytes(60 * 2**20))
        assert run.end() == 1, run.words
        assert "bytes" in run.words or "GB" in run.words
        assert [p.name for p in (folder / "run").glob("checkpoint-*")] == ["checkpoint-4"]
        ballast.unlink(missing_ok=True)
        remount(folder, "size=1g")
        goes_on(site, whole, folder / "run", 4)


@outcome(
    "The run folder becomes read-only",
    "exit code 1 at the next save, which is named; earlier checkpoints are whole",
)
@pytest.mark.faults
def test_read_only_during_the_run(site, whole, tmp_path):
    with disk(tmp_path / "disk", 512) as folder:
        run = start(options(site, max_steps=4000, save_steps=4), folder / "run")
        run.wait_for(5)
        run.hurt(signal.SIGSTOP)
        remount(folder, "ro")
        run.hurt(signal.SIGCONT)
        code = run.end()
        remount(folder, "rw")
        assert code == 1, run.words
        assert "no checkpoint was written, earlier ones are whole" in run.words
        assert "Read-only file system" in run.words


@outcome("The run folder cannot be written to at the start", "exit code 2 at once, naming it")
def test_read_only_from_the_start(site, tmp_path):
    with disk(tmp_path / "disk", 64) as folder:
        remount(folder, "ro")
        run = start(options(site), folder / "run")
        assert run.end() == 2, run.words
        assert f"--output_dir {folder}/run" in run.words

"""Two starts in one folder: the second says who is there, and follows if the first was killed."""

import json
import os
import signal
import subprocess
import sys

import pytest

from qwen3_sft.cli import main
from qwen3_sft.records.folder_lock import lock_inside
from qwen3_sft.records.ownership import OVERWRITTEN, REPLACED, RUN_MARK
from tests.e2e.test_faults import options, site  # noqa: F401 - a fixture
from tests.support.commands import ROOT
from tests.support.faults import start

pytestmark = pytest.mark.e2e


def test_a_second_start_is_refused_and_a_killed_one_followed(site, tmp_path, capsys):  # noqa: F811
    output = tmp_path / "run"
    (output / "notes").mkdir(parents=True)
    first = start(options(site), output)
    first.wait_for(1)
    first.hurt(signal.SIGSTOP)  # so that it is there while the others come
    try:
        before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
        second = start(options(site), output)
        assert second.end() == 2, second.words
        who = f"is in use by process {first.process.pid} on "
        assert f"error: {output} {who}" in second.words
        assert main(["export", str(tmp_path / "checkpoint"), str(output / "model")]) == 2
        assert who in capsys.readouterr().err
        assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
    finally:
        first.hurt(signal.SIGKILL)
    assert first.end() == -signal.SIGKILL
    assert lock_inside(output).exists()

    third = start(options(site), output)
    assert third.end() == 0, third.words
    assert f"process {first.process.pid}, which worked in it, has ended" in third.words
    # A new record of a run belongs into OVERWRITTEN, or it would be written over a user's file.
    written = (OVERWRITTEN, REPLACED)
    names = {path.name for path in output.iterdir()}
    assert {n for n in names if not any(w.fullmatch(n) for w in written)} == {RUN_MARK, "notes"}
    again = start(options(site), output)
    assert again.end() == 0
    assert "holds a finished run" in again.words


def test_of_two_exports_into_one_folder_one_is_refused(site, tmp_path):  # noqa: F811
    output = tmp_path / "run"
    run = start(options(site, max_steps=4), output)
    assert run.end() == 0, run.words
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "qwen3_sft.cli", "export", output / "checkpoint-4"]
    exports = [
        subprocess.Popen(
            [*words, tmp_path / "model"], env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for _ in range(2)
    ]  # fmt: skip
    said = [export.communicate(timeout=120)[0] for export in exports]
    codes = [export.returncode for export in exports]
    assert sorted(codes) == [0, 2], said
    winner = exports[codes.index(0)].pid
    assert f"in use by process {winner} on " in said[codes.index(2)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "run"]
    mark = json.loads((tmp_path / "model" / "qwen3_sft_export.json").read_text())
    assert mark["source"] == "run/checkpoint-4"
    assert {*mark["files"], "qwen3_sft_export.json"} == {*os.listdir(tmp_path / "model")}

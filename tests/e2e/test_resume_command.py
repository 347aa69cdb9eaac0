import json
import shutil
import sys

import pytest
import torch
import yaml
from transformers import get_cosine_schedule_with_warmup

from qwen3_sft.cli import main
from qwen3_sft.commands import resume
from qwen3_sft.commands.resume import differences, next_record
from tests.e2e.test_faults import records, site, whole  # noqa: F401 - fixtures
from tests.support.commands import metrics
from tests.support.faults import outcome, start

pytestmark = pytest.mark.e2e


@pytest.fixture
def killed(whole, tmp_path):  # noqa: F811
    """What is left of a run that was killed in step 7: its checkpoint is that of step 4."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoint-8")
    shutil.rmtree(run / "model")
    (run / "summary.json").unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:6]) + lines[6][:20])
    return run


@pytest.fixture
def forked(monkeypatch):
    """What is launched is forked, not started; the first test launches as users do."""

    def launch(argv):
        position = argv.index("--output_dir")
        words = [*argv[:position], *argv[position + 2 :]]
        run = start(words, argv[position + 1])
        code = run.end()
        sys.stdout.write(run.words)
        return code

    monkeypatch.setattr(resume, "launch", launch)


def content(folder):
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_verify_repeats_a_recorded_step_and_changes_nothing(killed, capfd):
    before = content(killed)
    assert main(["resume", str(killed), "--verify"]) == 0
    words = capfd.readouterr().out
    assert f"{killed}/checkpoint-4: " in words
    assert "checkpoint-4 resumes exactly: up to step 5 loss, grad_norm, learning_rate" in words
    assert content(killed) == before


@pytest.mark.usefixtures("forked")
def test_verify_repeats_a_finished_run_from_before_its_end(whole, capfd):  # noqa: F811
    assert main(["resume", str(whole), "--verify"]) == 0
    assert "checkpoint-4 resumes exactly: up to step 5 " in capfd.readouterr().out


@pytest.mark.usefixtures("forked")
def test_verify_of_nothing_but_the_end_loads_it(whole, tmp_path, capfd):  # noqa: F811
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoint-4")
    assert main(["resume", str(run), "--verify"]) == 0
    assert "checkpoint-8 loads, with its optimizer. It is the end" in capfd.readouterr().out


@pytest.mark.usefixtures("forked")
@outcome(
    "A finished run is started again",
    "exit code 0 if it is the run that is asked for, 2 naming what differs if not; with more steps "
    "it goes on from its last checkpoint, at the learning rate of a longer run",
)
def test_a_finished_run_goes_on_if_more_steps_are_asked_for(whole, tmp_path, capfd):  # noqa: F811
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    assert main(["resume", str(run), "--max_steps", "10", "--learning_rate", "2e-3"]) == 2
    assert "holds a finished run of other options: learning_rate" in capfd.readouterr().out
    assert len(metrics(run)) == 8
    assert main(["resume", str(run), "--max_steps", "10"]) == 0
    assert [record["step"] for record in metrics(run)] == list(range(1, 11))
    assert records(run)[:8] == records(whole)
    optimizer = torch.optim.SGD([torch.zeros(1)], 1e-3)
    schedule = get_cosine_schedule_with_warmup(optimizer, 2, 10)
    expected = []
    for _ in range(10):
        expected += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    assert [record["learning_rate"] for record in metrics(run)[8:]] == expected[8:]
    assert json.loads((run / "summary.json").read_text())["steps"] == 10


@pytest.mark.faults
@pytest.mark.usefixtures("forked")
def test_verify_finds_a_run_that_would_not_be_repeated(killed, capfd):
    lines = [json.loads(line) for line in (killed / "metrics.jsonl").read_text().splitlines()[:6]]
    lines[4]["loss"] += 1e-6
    (killed / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert main(["resume", str(killed), "--verify"]) == 1
    expected = f"does not repeat the run: at step 5 loss {lines[4]['loss']} -> "
    assert expected in capfd.readouterr().out


@pytest.mark.faults
def test_resume_goes_on_from_the_run_folder_alone(killed, whole, capfd):  # noqa: F811
    config = yaml.safe_load((killed / "config.yaml").read_text())
    assert "resume" not in config
    assert main(["resume", str(killed)]) == 0
    assert f"resuming from {killed}/checkpoint-4" in capfd.readouterr().out
    assert records(killed) == records(whole)


def test_what_is_no_run_is_told(tmp_path, capsys):
    assert main(["resume", str(tmp_path)]) == 2
    assert "it has no config.yaml" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text("model_name_or_path: m\ndataset: d.jsonl\n")
    assert main(["resume", str(tmp_path), "--verify"]) == 1
    assert "has no whole checkpoint" in capsys.readouterr().err


def test_the_record_to_compare_with(tmp_path):
    file = tmp_path / "metrics.jsonl"
    assert next_record(file, 0) is None
    file.write_text('{"step": 10, "loss": 1.0}\n{"step": 20, "loss": 0.5}\n{"step": 2')
    assert next_record(file, 10) == {"step": 20, "loss": 0.5}
    assert next_record(file, 20) is None


def test_differences_beyond_the_tolerance_only():
    before = {"loss": 1.0, "grad_norm": 2.0, "tokens": 5}
    assert differences(before, dict(before), 0.0) == []
    after = before | {"grad_norm": 2.001, "tokens": 6}
    assert differences(before, after, 0.0) == ["grad_norm 2.0 -> 2.001", "tokens 5 -> 6"]
    assert differences(before, after, 1e-3) == ["tokens 5 -> 6"]

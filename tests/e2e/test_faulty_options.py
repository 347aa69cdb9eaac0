"""Options and data that a run must not go on with, or not begin with."""

import json

import pytest

from tests.e2e.test_faults import goes_on, options, site, whole  # noqa: F401 - fixtures
from tests.support.commands import metrics
from tests.support.data_rows import sums
from tests.support.faults import outcome, start

pytestmark = pytest.mark.e2e


@pytest.fixture
def begun(site, tmp_path):  # noqa: F811
    """A run that a signal ended after step 4 of 8."""
    run = start(options(site, max_steps=4, lr_scheduler_type="constant"), tmp_path / "run")
    assert run.end() == 0, run.words
    (run.output / "summary.json").unlink()
    return run.output


@outcome(
    "Batch size, data, template, row length, packing, held-out share or seed differ on resume",
    "exit code 1, naming the field with both values; `--allow_change FIELD` goes on all the same",
)
@pytest.mark.parametrize(
    ("field", "changed"),
    [
        ("data", {}),
        *(
            pytest.param(field, changed, marks=pytest.mark.faults)
            for field, changed in (
                ("global_batch_size", {"global_batch_size": 4}),
                ("template", {"train_on": "last_assistant"}),
                ("max_length", {"max_length": 192}),
                ("packing", {"packing": "false"}),
                ("eval_fraction", {"eval_fraction": 0.1}),
                ("seed", {"seed": 7}),
            )
        ),
    ],
)
def test_changed_on_resume(site, begun, field, changed, tmp_path):  # noqa: F811
    if field == "data":
        other = tmp_path / "other.jsonl"
        other.write_text("\n".join(map(json.dumps, sums(48))))
        changed = {"dataset": other}
    now = options(site, **{"max_steps": 6, "lr_scheduler_type": "constant"} | changed)
    run = start(now, begun)
    assert run.end() == 1, run.words
    assert f"saved by a run that differs: {field} " in run.words
    assert f"--allow_change {field}" in run.words
    run = start([*now, "--allow_change", field], begun)
    assert run.end() == 0, run.words
    assert f"was saved with another {field}" in run.words


@outcome(
    "Learning rate, its schedule, decay or clipping differ on resume",
    "exit code 1, naming the option with both values; with `--allow_change OPTION` the rate is "
    "that of a run with the new values throughout, the others count from the next step on",
)
def test_another_learning_rate_on_resume(site, begun):  # noqa: F811
    now = options(site, lr_scheduler_type="constant", learning_rate="2e-3", max_steps=6)
    run = start(now, begun)
    assert run.end() == 1, run.words
    assert "learning_rate 0.001 -> 0.002" in run.words
    run = start([*now, "--allow_change", "learning_rate"], begun)
    assert run.end() == 0, run.words
    assert [record["learning_rate"] for record in metrics(begun)] == [
        0.001, 0.001, 0.001, 0.001, 0.002, 0.002
    ]  # fmt: skip


@outcome(
    "The base model, the optimizer or the dtype of the weights differ on resume",
    "exit code 1: the checkpoint is made of the old ones",
)
@pytest.mark.faults
def test_another_optimizer_on_resume(site, begun):  # noqa: F811
    run = start(options(site, lr_scheduler_type="constant", optim="adafactor"), begun)
    assert run.end() == 1, run.words
    assert "optim adamw_torch_fused -> adafactor" in run.words


@outcome("No step to train: no rows, or none that fit", "exit code 2 with the counts")
def test_no_rows(site, tmp_path):  # noqa: F811
    run = start(options(site, max_length=4, max_drop_fraction=1.0), tmp_path / "run")
    assert run.end() == 2, run.words
    assert "Traceback" not in run.words


@outcome("No token carries a label", "exit code 2 before the model is loaded")
def test_no_labels(site, tmp_path):  # noqa: F811
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, -100, -100]}] * 20
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = start(
        options(site, dataset=tmp_path / "rows.jsonl", max_drop_fraction=1.0), tmp_path / "run"
    )
    assert run.end() == 2, run.words
    assert "Traceback" not in run.words

"""A second start in the folder of a finished run: done, to be continued, or another run."""

import json

import pytest

from qwen3_sft.checkpoints.finished import is_asked_for
from qwen3_sft.data.identity import data_fingerprint
from qwen3_sft.errors import UsageError
from qwen3_sft.options.changes import comparable
from qwen3_sft.options.recipe import parse_options
from qwen3_sft.records.run_folder import RunFolder


@pytest.fixture
def finished(tmp_path):
    """Return a function that compares words with a run of 8 steps that has ended."""
    data = tmp_path / "rows.jsonl"
    data.write_text('{"text": "one"}\n')
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    common = [
        "--model_name_or_path", "m", "--dataset", str(data), "--data_cache_dir", str(tmp_path),
        "--output_dir", str(folder.path),
    ]  # fmt: skip
    stopping = ["--load_best_model_at_end", "true", "--eval_fraction", "0.1"]
    asked = parse_options(
        [*common, *stopping, "--max_steps", "8", "--early_stopping_patience", "2"]
    )
    folder.write_json("data_report.json", {"fingerprints": {"data": data_fingerprint(asked.data)}})

    def ask(*words, early=False, steps="8", patience="2", rate="1e-05"):
        used = asked.replaced(bf16=True, gradient_accumulation_steps=2)
        summary = {
            "asked": comparable(asked.values()), "used": comparable(used.values()),
            "stopped_early": early,
        }  # fmt: skip
        folder.write_json("summary.json", summary)
        given = ["--max_steps", steps, "--learning_rate", rate]
        given += ["--early_stopping_patience", patience] if patience else []
        options = parse_options([*common, *stopping, *given, *words])
        return is_asked_for(folder, folder.summary() or {}, options)

    ask.data, ask.folder = data, folder
    return ask


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--logging_steps", "5", "--save_total_limit", "1", "--dataloader_num_workers", "2"],
        ["--bf16", "true", "--gradient_accumulation_steps", "2"],  # as its config.yaml has them
        ["--num_train_epochs", "4"],  # which the steps overrule
    ],
)
def test_the_same_run_is_done(finished, words):
    assert finished(*words) is True


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--weight_decay", "0.1"], "weight_decay 0.0 -> 0.1"),
        (["--model_name_or_path", "other"], "model_name_or_path m -> other"),
        (["--max_length", "64"], "max_length 4096 -> 64"),
        (["--seed", "7"], "seed 42 -> 7"),
        (["--fp8", "all"], "fp8 off -> all"),
        (["--export_dtype", "float16"], "export_dtype auto -> float16"),
        (["--push_to_hub", "true"], "push_to_hub False -> True"),
        (["--train_on", "all"], "train_on assistant -> all"),
        (["--bf16", "true", "--gradient_accumulation_steps", "4"],
         "gradient_accumulation_steps 1 -> 4"),
        (["--resume", "never"], "--resume never"),
        (["--resume", "elsewhere/checkpoint-2"], "--resume elsewhere/checkpoint-2"),
    ],
)  # fmt: skip
def test_another_run_is_refused_by_name(finished, words, named):
    with pytest.raises(UsageError, match="holds a finished run") as caught:
        finished(*words)
    assert named in str(caught.value)


def test_fewer_steps_are_another_run(finished):
    with pytest.raises(UsageError, match="max_steps 8 -> 4"):
        finished(steps="4")
    with pytest.raises(UsageError, match="max_steps 8 -> 4"):
        finished("--allow_change", "learning_rate", steps="4", rate="2e-5")


def test_more_steps_go_on(finished):
    assert finished(steps="9") is False
    assert finished("--num_train_epochs", "3", steps="-1") is False  # only the data can tell
    with pytest.raises(UsageError, match=r"learning_rate 1e-05 -> 2e-05.*--allow_change learning"):
        finished(steps="9", rate="2e-5")
    assert finished("--allow_change", "learning_rate", steps="9", rate="2e-5") is False
    with pytest.raises(UsageError, match="early_stopping_patience 2 -> 5"):
        finished(steps="9", patience="5")


def test_more_patience_goes_on_with_a_run_that_had_stopped(finished):
    assert finished(patience="5", early=True) is False
    assert finished(patience=None, early=True) is False
    for patience, early in (("1", True), ("5", False)):
        with pytest.raises(UsageError, match="early_stopping_patience"):
            finished(patience=patience, early=early)


def test_the_same_name_of_other_data_is_another_run(finished, tmp_path):
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(finished.data.read_bytes())
    assert finished("--dataset", str(moved)) is True
    moved.write_text('{"text": "two"}\n')
    with pytest.raises(UsageError, match=r"dataset \['.*rows.jsonl'\] -> \['.*moved.jsonl'\]"):
        finished("--dataset", str(moved))
    finished.data.write_text('{"text": "two"}\n')
    with pytest.raises(UsageError, match=r"the files of --dataset are not those of"):
        finished()
    finished.data.unlink()  # no longer there to be compared
    assert finished() is True


def test_a_run_of_an_earlier_version_does_not_say_what_it_was(finished):
    summary = json.loads('{"finished": true, "steps": 8}')
    with pytest.raises(UsageError, match="earlier version"):
        is_asked_for(finished.folder, summary, parse_options(
            ["--model_name_or_path", "m", "--dataset", "d"]))  # fmt: skip

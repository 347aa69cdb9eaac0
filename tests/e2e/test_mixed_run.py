import json

import pytest
import yaml

from qwen3_sft.cli import main
from tests.support.data_rows import sums
from tests.support.run_inputs import write_inputs

pytestmark = pytest.mark.e2e


@pytest.fixture
def recipe(tmp_path, tokenizer):
    """Write a recipe whose data is a mixture; returns what writes it anew with other entries."""
    options = dict(zip(*[iter(map(str, write_inputs(tmp_path, tokenizer)))] * 2, strict=True))
    (tmp_path / "more.jsonl").write_text("\n".join(json.dumps(row) for row in sums(12)))

    def write(**changes):
        values = {name[2:]: value for name, value in options.items()} | {
            "dataset": [f"{tmp_path}/rows.jsonl@0.5", {"path": f"{tmp_path}/more.jsonl"}],
            "eval_dataset": [
                {"path": f"{tmp_path}/rows.jsonl", "max_rows": 5}, f"{tmp_path}/more.jsonl",
            ],
            "output_dir": f"{tmp_path}/run", "max_length": 128, "num_train_epochs": 2,
            "eval_strategy": "epoch", "save_strategy": "no", "use_cpu": True,
        }  # fmt: skip
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(values | changes))
        return ["train", "--config", str(path)]

    return write


def cache_files(folder):
    return {path: path.stat().st_mtime_ns for path in (folder / "cache").glob("*/*")}


def test_a_mixture_is_trained_evaluated_and_recorded(recipe, tmp_path, capfd):
    command, run = recipe(), tmp_path / "run"
    assert main(["data", "prepare", command[-1], "--format", "json"]) == 0
    prepared = json.loads(capfd.readouterr().out)
    assert not run.exists()
    made = cache_files(tmp_path)
    assert main(command) == 0
    assert cache_files(tmp_path) == made
    report = json.loads((run / "data_report.json").read_text())
    assert report == prepared["dataset"]
    assert json.loads((run / "eval_data_report.json").read_text()) == prepared["evaluation"]
    assert [(s["source"], s["rows_in"], s["repeat"]) for s in report["sources"]] == [
        ("rows", 40, 0.5), ("more", 12, 1.0),
    ]  # fmt: skip
    found = json.loads((run / "summary.json").read_text())["evaluation"]
    labels = [found[f"eval{name}_label_tokens"] for name in ("", "_rows", "_more")]
    assert labels[0] == labels[1] + labels[2]
    weighed = labels[1] * found["eval_rows_loss"] + labels[2] * found["eval_more_loss"]
    assert found["eval_loss"] == pytest.approx(weighed / labels[0])
    # What the run wrote down is what it was asked for.
    again = ["train", "--config", str(run / "config.yaml")]
    assert main(again) == 0
    assert "holds a finished run" in capfd.readouterr().out
    more = [f"{tmp_path}/rows.jsonl@2", f"{tmp_path}/more.jsonl"]
    assert main(recipe(dataset=more)) == 2
    assert "holds a finished run of other options: dataset" in capfd.readouterr().out

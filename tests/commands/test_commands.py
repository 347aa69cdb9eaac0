"""What the commands say of themselves and of words that they cannot use."""

import json
import subprocess
import sys

import pytest

from qwen3_sft.cli import main
from qwen3_sft.commands.plan import _gpus
from qwen3_sft.errors import UsageError
from qwen3_sft.hardware import DEVICES
from qwen3_sft.options.command_line import read_options
from tests.support.source_tree import ROOT

LEAST = ("--dataset", "d.jsonl", "--model_name_or_path", "m")


@pytest.mark.parametrize(
    "words", [("plan",), *(("data", name) for name in ("inspect", "prepare"))], ids=" ".join
)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_says_what_it_takes(words, flag, capsys):
    assert main([*words, flag]) == 0
    assert capsys.readouterr().out.startswith(f"usage: qwen3-sft {' '.join(words)}")


@pytest.mark.parametrize("command", ["export", "resume"])
def test_help_of_commands_with_own_options_only(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: qwen3-sft {command}")


@pytest.mark.parametrize("n", ["0", "-3"])
def test_fewer_samples_than_one_are_refused(n, capsys):
    assert main(["data", "inspect", "-n", n, *LEAST]) == 2
    assert f"-n {n}: must be at least 1" in capsys.readouterr().err


def test_a_plan_needs_no_recipe(capsys):
    assert main(["plan", "--model_name_or_path", "demo", "--gpus", "1xH200"]) == 0
    assert "fits" in capsys.readouterr().out


def test_an_unknown_gpu_lists_the_known_ones(capsys):
    assert main(["plan", "--model_name_or_path", "demo", "--gpus", "H900"]) == 2
    printed = capsys.readouterr().err
    assert all(device.name in printed for device in DEVICES)


@pytest.mark.parametrize("verify", [[], ["--verify"]])
def test_a_resume_needs_a_run_folder_and_right_options(tmp_path, capsys, verify):
    run = tmp_path / "run"
    (run / "checkpoint-2").mkdir(parents=True)
    (run / "config.yaml").write_text("model_name_or_path: demo\ndataset: [demo]\n")
    assert main(["resume", str(run / "checkpoint-2/"), *verify]) == 2
    assert f"did you mean {run}?" in capsys.readouterr().err
    assert main(["resume", str(run), "--max_steps", "x", *verify]) == 2
    assert "--max_steps" in capsys.readouterr().err
    for text in ("max_steps: [", "", "- a"):
        (run / "config.yaml").write_text(text)
        assert main(["resume", str(run), *verify]) == 2
        assert capsys.readouterr().err.count("error: ") == 1


def test_what_is_no_checkpoint_is_told_before_anything_is_read(tmp_path, capsys):
    def said(folder):
        assert main(["export", str(folder), str(tmp_path / "out")]) == 2
        return capsys.readouterr().err

    assert "no such folder; give a checkpoint of a run, RUN/checkpoint-N" in said(tmp_path / "x")
    (tmp_path / "run/checkpoint-4").mkdir(parents=True)
    assert f"is a run, not a checkpoint; its newest is {tmp_path}/run/checkpoint-4" in said(
        tmp_path / "run"
    )
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    assert "holds a model, not a checkpoint" in said(tmp_path / "model")
    assert not (tmp_path / "out").exists()


# ---- what is told at once: seconds of imports are what a user waits for ----

_HEAVY = {"torch", "transformers", "accelerate", "datasets", "numpy", "pyarrow", "tokenizers"}
_AT_ONCE = """
import contextlib, io, json, os, sys
from qwen3_sft.cli import main
from qwen3_sft.launch.multinode import main as multinode
from qwen3_sft.train import main as train
found = []
for program, words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        try:
            code = {"cli": main, "multinode": multinode, "train": train}[program](words)
        except SystemExit as end:
            code = end.code
    heavy = sorted(set(sys.modules) & set(json.loads(sys.argv[2])))
    found.append([code, out.getvalue(), heavy])
print(json.dumps(found))
"""
HELP = [
    ("cli", []), ("cli", ["--help"]),
    ("cli", ["train", "--help"]), ("cli", ["train", "--help_all"]),
    ("cli", ["plan", "--help"]), ("cli", ["data", "inspect", "-h"]),
    ("cli", ["data", "prepare", "-h"]), ("cli", ["export", "--help"]),
    ("cli", ["resume", "--help"]), ("multinode", ["--help"]), ("train", ["--help"]),
]  # fmt: skip
MISTAKES = [
    ("cli", ["train", "--max_stepz", "3"], "--max_steps?"),
    ("cli", ["train", "--max_steps", "3"], "the demo is --config config/recipe/demo.yaml"),
    ("cli", ["train", *LEAST, "--learning_rate", "nan"], "--learning_rate nan"),
    ("cli", ["train", *LEAST, "word"], "unexpected value 'word'"),
    ("cli", ["train", "--config", "/"], "--config /: cannot be read: Is a directory"),
    ("cli", ["train", *LEAST, "--fp16", "true", "--bf16", "true"], "--fp16 and --bf16"),
    ("cli", ["plan", "gone.yaml"], "--config gone.yaml: no such file"),
    ("cli", ["plan", *LEAST, "--seed", "-1"], "--seed -1"),
    ("cli", ["data", "inspect", *LEAST, "--packing", "perhaps"], "'perhaps'"),
    ("cli", ["data", "prepare", "gone.yaml"], "--config gone.yaml: no such file"),
    ("cli", ["data", "prepare", *LEAST, "--max_rows", "0"], "--max_rows 0"),
    ("cli", ["data"], "unknown command 'data'"), ("cli", ["trian"], "unknown command 'trian'"),
    ("cli", ["resume", "nowhere"], "nowhere is no run folder"),
    ("cli", ["export", "nowhere", "out"], "nowhere: no such folder; give a checkpoint"),
    ("cli", ["export", "nowhere"], "required: folder"),
    ("multinode", [*LEAST, "--epochs", "3"], "--num_train_epochs?"),
    ("train", [*LEAST, "--seed", "a"], "--seed"),
]  # fmt: skip


def test_help_and_mistakes_need_no_heavy_import(tmp_path):
    calls = [*HELP, *((program, words) for program, words, _ in MISTAKES)]
    command = [sys.executable, "-c", _AT_ONCE, json.dumps(calls), json.dumps(sorted(_HEAVY))]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == len(calls)
    for (program, words), (code, printed, heavy) in zip(calls, found, strict=True):
        assert not heavy, (program, words, heavy)
        assert "usage: " in printed or code == 2, (words, printed)
        assert code == (0 if (program, words) in HELP[1:] else 2), (program, words, printed)
    for (_, words, sentence), (_, printed, _) in zip(MISTAKES, found[len(HELP) :], strict=True):
        assert sentence in printed, (words, printed)
    assert not any(tmp_path.iterdir()), "nothing was written"


@pytest.mark.parametrize(
    ("name", "value"), [("DRY_RUN", "maybe"), ("DRY_RUN", ""), ("ACCELERATE_CONFIG", ""),
                        ("RANK", "abc"), ("WORLD_SIZE", "0"), ("MASTER_PORT", "a")],
)  # fmt: skip
def test_a_variable_that_means_nothing(name, value, monkeypatch, capfd):
    monkeypatch.setenv(name, value)
    assert main(["train", *LEAST]) == 2
    printed = "".join(capfd.readouterr())
    assert name in printed
    assert "Traceback" not in printed


# ---- the GPUs that a plan is for ----


def given(tmp_path, text: str):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model_name_or_path: demo\n{text}", encoding="utf-8")
    return read_options(["--config", str(path)], needs_data=False)


def test_a_plan_is_for_the_gpus_of_the_recipe(tmp_path):
    recipe = given(tmp_path, "planned_for: 16xB200\n")
    count, gpu = _gpus(None, recipe)
    assert (count, gpu.name) == (16, "B200")
    assert "planned_for" not in recipe.values
    count, gpu = _gpus("2xH100", recipe)
    assert (count, gpu.name) == (2, "H100 SXM"), "the command line wins"
    with pytest.raises(UsageError, match=r"recipe\.yaml: planned_for: 8xH900: unknown; known are"):
        _gpus(None, given(tmp_path, "planned_for: 8xH900\n"))


@pytest.mark.parametrize("value", ["", "''", "[8xH200]", "{a: b}"])
def test_gpus_of_a_recipe_that_are_none(tmp_path, value):
    with pytest.raises(UsageError, match=r"recipe\.yaml:2: planned_for: write it as 8xH200"):
        given(tmp_path, f"planned_for: {value}\n")


def test_a_plan_for_no_gpu_lists_the_known_ones(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(UsageError, match="no GPU is here and the recipe names none") as error:
        _gpus(None, given(tmp_path, ""))
    assert all(device.name in str(error.value) for device in DEVICES)

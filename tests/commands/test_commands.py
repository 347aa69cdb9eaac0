"""What the commands say of themselves and of words that they cannot use."""

import pytest

from qwen3_sft.cli import main
from qwen3_sft.hardware import DEVICES

LEAST = ("--dataset", "d.jsonl", "--model_name_or_path", "m")


@pytest.mark.parametrize("words", [("plan",), ("data", "inspect")], ids=" ".join)
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

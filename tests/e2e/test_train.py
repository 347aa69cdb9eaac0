import json
import sys

import pytest
import safetensors.torch
import yaml
from transformers import AutoModelForCausalLM

from qwen3_sft.cli import main
from qwen3_sft.demo.model import write_checkpoint
from qwen3_sft.logs import set_up_logging
from qwen3_sft.run import run_command
from qwen3_sft.training.metrics import KEYS
from tests.support.commands import cli, metrics, run, succeeds

pytestmark = pytest.mark.e2e

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}


def long_alpaca(folder):
    rows = [
        {
            "instruction": f"Name number {i}.",
            "input": "" if i % 2 else "In digits.",
            "output": f"{i}",
        }
        for i in range(30)
    ]
    (folder / "long_alpaca.json").write_text(json.dumps(rows, indent=2))
    return folder / "long_alpaca.json", "0<|im_end|>"


def sharegpt(folder):
    rows = [
        {"id": i, "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": f"Say {i}."}, {"from": "gpt", "value": f"{i}!"},
            {"from": "human", "value": "Again."}, {"from": "gpt", "value": f"{i}!!"},
        ]}
        for i in range(30)
    ]  # fmt: skip
    (folder / "share.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "share.jsonl", "0!<|im_end|>"


def tools(folder):
    rows = [
        {"tools": [WEATHER], "messages": [
            {"role": "user", "content": f"Weather in Ulm, day {i}?"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": f"sunny, {i} degrees"},
            {"role": "assistant", "content": f"Sunny with {i} degrees."},
        ]}
        for i in range(30)
    ]  # fmt: skip
    (folder / "tools.jsonl").write_text("\n".join(map(json.dumps, rows)))
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call><|im_end|>'
    return folder / "tools.jsonl", call


def train_here(*words):
    """Train in this process, which saves three imports; the command line is tried elsewhere."""
    assert run_command([*map(str, words), "--use_cpu", "true"]) == 0


@pytest.fixture
def base(tokenizer, tmp_path):
    write_checkpoint(tmp_path / "base", tokenizer)
    return tmp_path / "base"


@pytest.mark.parametrize("make", [long_alpaca, sharegpt, tools])
def test_inspect_and_train_what_users_bring(make, base, tmp_path, capsys):
    data, expected = make(tmp_path)
    where = ("--model_name_or_path", base, "--dataset", data)
    words = ("data", "inspect", *where, "-n", 2, "--format", "json")
    if make is tools:  # as a user would, with all its processes
        shown = succeeds(cli(*words))
    else:
        assert main([str(word) for word in words]) == 0
        shown = capsys.readouterr().out
    samples = [json.loads(line) for line in shown.splitlines()]
    assert len(samples) == 2
    assert expected in samples[0]["trained"]
    for sample in samples:
        assert len(sample["input_ids"]) == len(sample["labels"])
        pairs = zip(sample["input_ids"], sample["labels"], strict=True)
        assert all(label in (token, -100) for token, label in pairs)

    out = tmp_path / "run"
    train = (
        *where, "--output_dir", out, "--max_length", 512, "--max_steps", 16,
        "--learning_rate", "1e-2", "--data_cache_dir", tmp_path / "cache", "--save_steps", 100,
    )  # fmt: skip
    if make is tools:
        succeeds(cli("train", *train))
    else:
        train_here(*train)
    records = metrics(out)
    assert tuple(records[0]) == KEYS
    assert records[-1]["loss"] < records[0]["loss"]
    report = json.loads((out / "data_report.json").read_text())
    assert report["rows_in"] == report["rows_used"] == 30
    environment = json.loads((out / "environment.json").read_text())
    assert environment["patches"].keys() == {
        "scatter_moe", "varlen_attention", "router_aux_loss", "linear_cross_entropy",
    }  # fmt: skip
    exported = safetensors.torch.load_file(out / "model" / "model.safetensors")
    assert exported.keys() == safetensors.torch.load_file(base / "model.safetensors").keys()
    AutoModelForCausalLM.from_pretrained(out / "model")

    # the resolved config is a recipe; a finished run is not touched
    assert yaml.safe_load((out / "config.yaml").read_text())["max_length"] == 512
    before = (out / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    set_up_logging()
    assert run_command(["--config", str(out / "config.yaml")]) == 0
    again = capsys.readouterr().out
    assert "finished run" in again
    assert "--output_dir" in again
    assert (out / "metrics.jsonl").read_bytes() == before


def test_a_bad_row_ends_with_code_2_and_its_place(base, tmp_path):
    data = bad_rows(tmp_path)
    where = ("--model_name_or_path", base, "--dataset", data, "--output_dir", tmp_path / "run")
    result = cli("train", *where, "--data_cache_dir", tmp_path / "cache")
    assert result.returncode == 2
    assert f"{data}:2" in result.stdout
    assert "has role 'nobody'" in result.stdout
    assert "Traceback" not in result.stdout + result.stderr


def bad_rows(folder):
    """Write a good row and one whose role is none."""
    data = folder / "rows.jsonl"
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    data.write_text(json.dumps(good) + '\n{"messages": [{"role": "nobody", "content": "x"}]}\n')
    return data


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--modle", "x"), "--model_name_or_path"),
        (("--resume", "absent"), "--resume"),
        (("--deepspeed", "x.json", "--max_rows", 1), "config/zero3.json"),
        (("--early_stopping_patience", 2, "--max_rows", 1), "--load_best_model_at_end"),
        (("--report_to", "trackio", "--max_rows", 1), "--report_to trackio: not installed"),
        (("--output_dir", "FILE/below"), "--output_dir"),
    ],
)
def test_a_mistake_ends_with_code_2_and_its_name(base, tmp_path, caplog, arguments, named):
    """In this process: that the launcher passes the code on is shown above."""
    data = bad_rows(tmp_path)
    words = (
        "--model_name_or_path", base, "--dataset", data, "--output_dir", tmp_path / "run",
        "--data_cache_dir", tmp_path / "cache", "--use_cpu", "true", *arguments,
    )  # fmt: skip
    with caplog.at_level("INFO", logger="qwen3_sft"):
        assert run_command([str(word).replace("FILE", str(data)) for word in words]) == 2
    assert named in caplog.text


def test_resume_never_refuses_a_used_folder(base, tmp_path, caplog):
    data, _ = sharegpt(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious.txt").touch()
    words = (
        "--model_name_or_path", base, "--dataset", data, "--output_dir", tmp_path / "run",
        "--resume", "never",
    )  # fmt: skip
    assert run_command([str(word) for word in words]) == 2
    assert "precious.txt" in caplog.text


def test_accelerate_launch_equals_the_command(base, tmp_path):
    data, _ = sharegpt(tmp_path)
    common = (
        "--model_name_or_path", base, "--dataset", data, "--max_length", 256, "--max_steps", 2,
        "--data_cache_dir", tmp_path / "cache", "--save_strategy", "no",
    )  # fmt: skip
    train_here(*common, "--output_dir", tmp_path / "a")
    succeeds(
        run(
            sys.executable, "-m", "accelerate.commands.launch", "--config_file",
            "config/single.json", "-m", "qwen3_sft.train", *common, "--output_dir", tmp_path / "b",
        )
    )  # fmt: skip
    weights = "model/model.safetensors"
    assert (tmp_path / "a" / weights).read_bytes() == (tmp_path / "b" / weights).read_bytes()


def test_export_of_a_checkpoint(base, tmp_path):
    data, _ = sharegpt(tmp_path)
    train_here(
        "--model_name_or_path", base, "--dataset", data, "--max_length", 256, "--max_steps", 2,
        "--data_cache_dir", tmp_path / "cache", "--output_dir", tmp_path / "run", "--save_steps", 2,
    )  # fmt: skip
    succeeds(cli("export", tmp_path / "run" / "checkpoint-2", tmp_path / "out"))
    tensors = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert {str(t.dtype) for t in tensors.values()} == {"torch.bfloat16"}


def test_a_run_killed_during_export_only_exports(base, tmp_path):
    data, _ = sharegpt(tmp_path)
    out = tmp_path / "run"
    train = (
        "--model_name_or_path", base, "--dataset", data, "--max_length", 256, "--max_steps", 3,
        "--data_cache_dir", tmp_path / "cache", "--output_dir", out,
        "--save_steps", 3, "--lr_scheduler_type", "constant",
    )  # fmt: skip
    train_here(*train)
    weights, records = out / "model" / "model.safetensors", metrics(out)
    before = weights.read_bytes()
    (out / "summary.json").unlink()
    weights.unlink()
    train_here(*train)
    assert weights.read_bytes() == before
    assert metrics(out) == records

import json
import socket
import sys

import pytest
import safetensors.torch

from qwen3_sft.demo.model import write_checkpoint
from tests.commands import metrics, run, succeeds
from tests.oracle import assert_close

pytestmark = pytest.mark.distributed

TRAIN = (
    "--max_length", 64, "--max_steps", 6, "--learning_rate", "1e-2", "--use_cpu", "true",
    "--router_aux_loss_coef", 0.01, "--save_steps", 3, "--eval_fraction", 0.2, "--eval_steps", 3,
    "--eval_strategy", "steps", "--num_samples", 1, "--sample_max_new_tokens", 4,
)  # fmt: skip


def on_two_processes(*options):
    """Launch as on two GPUs, with gloo between the processes."""
    with socket.socket() as free:  # tests run beside each other
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return run(
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", "config/ddp.json",
        "--num_processes", 2, "--main_process_port", port, "-m", "qwen3_sft.train", *options,
        "--ddp_backend", "gloo",
    )  # fmt: skip


@pytest.fixture
def inputs(tokenizer, tmp_path):
    write_checkpoint(tmp_path / "base", tokenizer)
    rows = [
        {"messages": [
            {"role": "user", "content": f"What is {i} plus {i}?"},
            {"role": "assistant", "content": f"It is {2 * i}." + " Really." * (i % 4)},
        ]}
        for i in range(40)
    ]  # fmt: skip
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    return (
        "--model_name_or_path", tmp_path / "base", "--dataset", data,
        "--data_cache_dir", tmp_path / "cache", *TRAIN,
    )  # fmt: skip


def test_two_processes_equal_one(inputs, tmp_path):
    one = run(
        sys.executable, "-m", "qwen3_sft.train", *inputs, "--output_dir", tmp_path / "one",
        "--gradient_accumulation_steps", 2,
    )  # fmt: skip
    succeeds(one)
    two = on_two_processes(*inputs, "--output_dir", tmp_path / "two")
    succeeds(two)
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        for key in ("loss", "grad_norm", "aux_loss", "router_entropy"):
            assert b[key] == pytest.approx(a[key], rel=1e-4), (a["step"], key)
        for key in ("step", "tokens", "label_tokens", "padding_fraction", "learning_rate"):
            assert b[key] == a[key], (a["step"], key)
    reference = safetensors.torch.load_file(tmp_path / "one" / "model" / "model.safetensors")
    exported = safetensors.torch.load_file(tmp_path / "two" / "model" / "model.safetensors")
    for name, tensor in reference.items():
        assert_close(exported[name], tensor, name=name, rms=1e-4)

    checkpoint = tmp_path / "two" / "checkpoint-3"
    resumed = on_two_processes(*inputs, "--output_dir", tmp_path / "rest", "--resume", checkpoint)
    succeeds(resumed)
    weights = "model/model.safetensors"
    assert (tmp_path / "rest" / weights).read_bytes() == (tmp_path / "two" / weights).read_bytes()
    assert [r["step"] for r in metrics(tmp_path / "rest")] == [4, 5, 6]


def test_a_bad_row_ends_all_processes_with_its_place(inputs, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text(data.read_text() + '\n{"messages": []}\n')
    two = on_two_processes(*inputs, "--output_dir", tmp_path / "two")
    assert two.returncode != 0
    assert "rows.jsonl:41" in two.stdout

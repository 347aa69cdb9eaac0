import json
import sys

import pytest

from qwen3_sft.run import run_command
from tests.support.commands import free_port, metrics, run, succeeds
from tests.support.run_inputs import write_inputs

pytestmark = pytest.mark.distributed

TRAIN = (
    "--max_length", 64, "--max_steps", 2, "--learning_rate", "1e-2", "--use_cpu", "true",
    "--router_aux_loss_coef", 0.01, "--eval_fraction", 0.2, "--eval_steps", 2,
    "--eval_strategy", "steps", "--num_samples", 1, "--sample_max_new_tokens", 4,
)  # fmt: skip


def on_two_processes(*options):
    """Launch as on two GPUs, with gloo between the processes."""
    return run(
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", "config/ddp.json",
        "--num_processes", 2, "--main_process_port", free_port(), "-m", "qwen3_sft.train", *options,
        "--ddp_backend", "gloo",
    )  # fmt: skip


@pytest.fixture
def inputs(tokenizer, tmp_path):
    return (*write_inputs(tmp_path, tokenizer), *TRAIN)


def test_accelerate_launch_trains_on_two_processes_and_one_goes_on(inputs, tmp_path):
    """The way in, and a checkpoint of two processes; more is in tests/distributed/test_engines.py.

    Two ranks' gradients are added as those of two micro-batches, up to the order of their sums.
    """
    words = (*inputs, "--max_steps", 4, "--save_steps", 2, "--global_batch_size", 2)
    succeeds(on_two_processes(*words, "--output_dir", tmp_path / "two"))
    assert [record["step"] for record in metrics(tmp_path / "two")] == [1, 2, 3, 4]
    environment = json.loads((tmp_path / "two" / "environment.json").read_text())
    assert (environment["world_size"], environment["engine"]["kind"]) == (2, "ddp")

    one = (*words, "--output_dir", tmp_path / "one", "--resume", tmp_path / "two" / "checkpoint-2")
    assert run_command([str(word) for word in one]) == 0
    pairs = zip(metrics(tmp_path / "one"), metrics(tmp_path / "two")[2:], strict=True)
    for alone, together in pairs:
        assert alone["loss"] == pytest.approx(together["loss"], rel=1e-6)
        for name in ("step", "tokens", "tokens_seen", "learning_rate", "skipped_steps"):
            assert alone[name] == together[name], name


def test_a_bad_row_ends_all_processes_with_its_place(inputs, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text(data.read_text() + '\n{"messages": []}\n')
    two = on_two_processes(*inputs, "--output_dir", tmp_path / "two")
    assert two.returncode != 0
    assert "rows.jsonl:41" in two.stdout

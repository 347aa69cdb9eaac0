"""qwen3_sft_multinode.sh over a real network: equal to one process, restarted, cut off."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest
import safetensors.torch

from tests.network.two_nodes import exit_codes, reason_to_skip, two_nodes, wait_until
from tests.support.commands import metrics, run, succeeds
from tests.support.oracle import assert_close
from tests.support.run_inputs import write_inputs

SKIP = reason_to_skip()
pytestmark = [pytest.mark.network, pytest.mark.skipif(SKIP is not None, reason=str(SKIP))]

OPTIONS = (
    "--max_length", 64, "--global_batch_size", 4, "--learning_rate", "1e-3", "--use_cpu", "true",
    "--num_samples", 0, "--router_aux_loss_coef", 0.01,
)  # fmt: skip
TWELVE_STEPS = ("--max_steps", 12, "--save_steps", 2)
WEIGHTS = "model/model.safetensors"
DIST_TIMEOUT_S = 10


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    with two_nodes(tmp_path_factory.mktemp("nodes")) as made:
        yield made


@pytest.fixture(scope="module")
def inputs(tokenizer, tmp_path_factory):
    return (*write_inputs(tmp_path_factory.mktemp("inputs"), tokenizer), *OPTIONS)


@pytest.fixture(scope="module")
def undisturbed(nodes, inputs, tmp_path_factory):
    """The run folder of twelve steps on two nodes."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    parts = nodes.start(folder.parent, *inputs, *TWELVE_STEPS, "--output_dir", folder)
    assert exit_codes(parts) == [0, 0], "\n".join(part.text() for part in parts)
    assert "nodes 2 x processes per node 1 = world size 2" in parts[1].text()
    return folder


def losses(folder):
    """Of each step, the last time that it was done."""
    return {record["step"]: record["loss"] for record in metrics(folder)}


def test_two_nodes_equal_one_process(undisturbed, inputs, tmp_path):
    one = run(
        sys.executable, "-m", "qwen3_sft.train", *inputs, *TWELVE_STEPS, "--output_dir",
        tmp_path / "one",
    )  # fmt: skip
    succeeds(one)
    expected = losses(tmp_path / "one")
    assert list(expected) == list(range(1, 13))
    assert losses(undisturbed) == pytest.approx(expected, rel=1e-6)
    reference = safetensors.torch.load_file(tmp_path / "one" / WEIGHTS)
    exported = safetensors.torch.load_file(undisturbed / WEIGHTS)
    for name, tensor in reference.items():
        assert_close(exported[name], tensor, name=name, rms=1e-4)


def test_killed_process_restarts_both_nodes_exactly(nodes, undisturbed, inputs, tmp_path):
    folder = tmp_path / "run"
    parts = nodes.start(
        tmp_path, *inputs, *TWELVE_STEPS, "--output_dir", folder, MAX_RESTARTS=2, RDZV_TIMEOUT=120
    )
    wait_until(lambda: (folder / "checkpoint-4").is_dir(), parts)
    (victim,) = nodes.workers(1)
    os.kill(victim, signal.SIGKILL)
    assert exit_codes(parts) == [0, 0], "\n".join(part.text() for part in parts)
    resumed = [line for line in parts[0].text().splitlines() if line.startswith("resuming from")]
    assert len(resumed) == 1, "one failure, one restart"
    assert losses(folder) == losses(undisturbed)
    assert (folder / WEIGHTS).read_bytes() == (undisturbed / WEIGHTS).read_bytes()


def test_cut_link_ends_both_nodes_in_time(nodes, inputs, tmp_path):
    folder = tmp_path / "run"
    parts = nodes.start(
        tmp_path, *inputs, "--max_steps", 100_000, "--num_train_epochs", 100_000, "--save_strategy",
        "no", "--dist_timeout_s", DIST_TIMEOUT_S, "--output_dir", folder,
    )  # fmt: skip
    records = folder / "metrics.jsonl"
    wait_until(lambda: records.is_file() and len(records.read_text().splitlines()) > 2, parts)
    nodes.cut()
    start = time.monotonic()
    try:
        codes = exit_codes(parts, timeout_s=DIST_TIMEOUT_S + 60)
    finally:
        nodes.mend()
    assert time.monotonic() - start > DIST_TIMEOUT_S - 2, "ended before the timeout: something else"
    for rank, part in enumerate(parts):
        assert codes[rank] == 1, part.text()
        assert f"Timed out waiting {DIST_TIMEOUT_S}000ms" in part.text()
        last = part.text().splitlines()[-1]
        assert last.startswith(f"node {rank} of 2 (198.51.100.{rank + 1}, rank {rank}) failed with")
        assert "start the same command on all nodes" in last

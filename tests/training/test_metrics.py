import json
import logging
import math
import time

import pytest

from qwen3_sft.hardware import MemoryStats
from qwen3_sft.packing.collator import BatchStats
from qwen3_sft.plan.advice import MemorySettings
from qwen3_sft.records.step_lines import StepLines
from qwen3_sft.training.memory_guard import MemoryWatch
from qwen3_sft.training.metrics import Window, duration, log_line, throughput


def test_throughput_counts_real_tokens_over_all_gpus():
    figures = throughput(
        (8000.0, 5000.0, 2000.0, 4e15), seconds=2.0, steps=4, num_gpus=2, peak_flops=4e15
    )
    assert figures == {
        "step_time_s": 0.5,
        "tokens": 8000,
        "tokens_per_second_per_gpu": 2000.0,
        "label_tokens": 5000,
        "padding_fraction": 0.2,
        "model_tflops_per_gpu": 1000.0,
        "mfu": 0.25,
    }
    unknown = throughput((1, 1, 0, 1), seconds=1, steps=1, num_gpus=1, peak_flops=None)
    assert unknown["mfu"] is None


def test_window_leaves_pauses_out():
    window = Window()
    with window.pause():
        time.sleep(0.2)
    assert window.seconds() < 0.1
    window.add(BatchStats(5, 3, 2, 1, 25), flops=7.0)
    window.add(BatchStats(1, 1, 1, 1, 1), flops=1.0)
    assert window.sums() == [6, 4, 3, 8.0]


def test_a_pause_within_a_pause_counts_once():
    """An evaluation pauses, and so do the completions and the save within it."""
    window = Window()
    window.started -= 1.0
    with window.pause(), window.pause():
        time.sleep(0.2)
        with window.pause():
            time.sleep(0.1)
    assert 0.25 < window.paused_s < 0.5
    assert window.seconds() == pytest.approx(1.0, abs=0.2)


def test_resume_drops_the_lines_that_will_be_written_again(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    for step in range(1, 6):
        if step == 1:
            file = StepLines(path)
        file.write({"step": step, "loss": math.nan if step == 2 else 1.0})
    with path.open("a") as cut:
        cut.write('{"step": 6, "lo')  # killed while writing
    StepLines(path, resume_step=3).write({"step": 4})
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 2, 3, 4]
    assert records[1]["loss"] == "nan"
    StepLines(path)
    assert path.read_text() == ""


def test_a_metrics_file_that_cannot_be_written_does_not_stop_the_run(tmp_path, caplog):
    file = StepLines(tmp_path / "metrics.jsonl")
    file.path = tmp_path  # a folder: opening it for writing fails
    logging.getLogger("qwen3_sft").propagate = True
    file.write({"step": 1})
    assert "training goes on" in caplog.text


def test_memory_warnings_say_what_to_lower(caplog):
    logging.getLogger("qwen3_sft").propagate = True
    watch = MemoryWatch(MemorySettings(train_rows=2))
    watch.check(MemoryStats(50, 60, 100, 0))
    assert not caplog.records
    watch.check(MemoryStats(90, 97, 100, 2))
    assert "2 times" in caplog.text
    assert "97% of memory" in caplog.text
    assert "--per_device_train_batch_size" in caplog.text
    caplog.clear()
    watch.check(MemoryStats(90, 97, 100, 2))
    assert not caplog.records
    watch.check(MemoryStats(90, 97, 100, 3))
    assert "3 times" in caplog.text


@pytest.mark.parametrize(("seconds", "text"), [(4.6, "5s"), (184, "3m04s"), (3725, "1h02m")])
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_log_line_shows_what_a_person_watches():
    record = {
        "step": 3, "loss": 1.5, "grad_norm": 0.25, "learning_rate": 1e-5, "mfu": 0.305,
        "tokens_per_second_per_gpu": 13011.4, "model_tflops_per_gpu": 300.3, "skipped_steps": 2,
        "peak_memory_gib": 62.04, "expert_load_max_over_mean": 1.25,
    }  # fmt: skip
    line = log_line(record, max_steps=10, seconds_left=61)
    for part in (
        "step 3/10", "loss 1.5000", "grad 0.25", "lr 1e-05", "13,011 tok/s/GPU", "300 TFLOP/s",
        "MFU 30.5%", "62.0 GiB", "experts 1.25x", "SKIPPED 2", "1m01s left",
    ):  # fmt: skip
        assert part in line
    assert "MFU" not in log_line(record | {"mfu": None}, 10, 1)

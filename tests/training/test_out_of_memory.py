import dataclasses
import sys

import pytest
import torch

from qwen3_sft.distributed.engine import Engine
from qwen3_sft.errors import GpuMemoryError
from qwen3_sft.plan.advice import MemorySettings, advice
from qwen3_sft.training.out_of_memory import GpuMemory, naming, surroundings
from tests.support.commands import run
from tests.support.training import make_trainer

FORWARD = "forward and backward of a micro-batch"
GIB = 2**30
ON_CPU = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 3221225472 bytes."
NOTHING_LEFT = MemorySettings(
    checkpointing="full", offload=True, in_backward=True, optim="adamw_torch_4bit", max_length=512
)


def options(run, stage=FORWARD):
    """The first option of each line."""
    return [line.split()[0] for line in advice(run, stage)]


# ---- advice ----


def test_advice_begins_with_what_costs_least():
    assert options(MemorySettings(train_rows=4)) == [
        "--activation_checkpointing", "--activation_offload", "--per_device_train_batch_size",
        "--optimizer_in_backward", "--max_length", "several",
    ]  # fmt: skip


def test_advice_leaves_out_what_is_set_or_impossible():
    assert options(NOTHING_LEFT) == ["several"]
    sharded = dataclasses.replace(NOTHING_LEFT, kind="native", world_size=8, shards=8)
    assert options(sharded) == ["more"]
    assert options(dataclasses.replace(sharded, shards=4)) == ["--fsdp_size"]
    assert "--optimizer_in_backward" not in options(MemorySettings(kind="ddp", world_size=2))


@pytest.mark.parametrize(
    ("now", "then"),
    [("none", "selective"), ("selective", "full"), ("auto", "full"), ("full", None)],
)
def test_each_policy_has_a_next_one(now, then):
    first = advice(MemorySettings(checkpointing=now), FORWARD)[0]
    assert first.startswith(f"--activation_checkpointing {then}") == (then is not None)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"train_rows": 6, "accumulation": 2}, "3 with --gradient_accumulation_steps 4,"),
        ({"train_rows": 4, "has_global_batch": True}, "2 (--global_batch_size keeps the step"),
        ({"train_rows": 2, "in_backward": True}, "1 (a step then has fewer tokens"),
    ],
)
def test_fewer_rows_say_what_becomes_of_the_step(values, text):
    assert f"--per_device_train_batch_size {text}" in " ".join(
        advice(MemorySettings(**values), FORWARD)
    )


@pytest.mark.parametrize("stage", ["states of the optimizer", "update of the optimizer"])
def test_activations_do_not_matter_to_the_optimizer(stage):
    assert options(MemorySettings(train_rows=4), stage) == ["--optimizer_in_backward", "several"]
    low_bit = MemorySettings(in_backward=True, optim="adamw_torch_8bit")
    assert advice(low_bit, stage)[0].startswith("--optim adamw_torch_4bit")


def test_evaluation_and_loading_have_their_own():
    assert options(MemorySettings(eval_rows=2), "evaluation")[0] == "--per_device_eval_batch_size"
    assert options(MemorySettings(), "loading the weights") == ["--dtype", "several"]


def test_settings_are_those_of_the_run(tiny_moe, tokenizer, tmp_path):
    args = make_trainer(
        tiny_moe, tokenizer, tmp_path, activation_checkpointing="full", activation_offload=True,
        per_device_train_batch_size=2, per_device_eval_batch_size=3, optim="adamw_torch_8bit",
        optimizer_in_backward=True, clip="per_tensor",
    ).args  # fmt: skip
    assert MemorySettings.of(args, Engine("native", fsdp_size=4), 96) == MemorySettings(
        kind="native", shards=4, checkpointing="full", offload=True, train_rows=2, eval_rows=3,
        max_length=96, in_backward=True, optim="adamw_torch_8bit",
    )  # fmt: skip


# ---- who holds the memory ----


def test_memory_of_others_and_unused_reserves_come_first():
    memory = GpuMemory(30 * GIB, 40 * GIB, 10 * GIB, 80 * GIB)
    assert memory.others == 30 * GIB
    first, second = surroundings(memory, {})
    assert "30.00 GiB" in first
    assert "expandable_segments:True" in second
    assert "10.00 GiB" in second
    is_set = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    assert surroundings(memory, is_set) == [first]
    assert surroundings(GpuMemory(39 * GIB, 40 * GIB, 39 * GIB, 80 * GIB), {}) == []


def test_the_sentence_has_every_number():
    text = str(GpuMemory(30 * GIB, 40 * GIB, 10 * GIB, 80 * GIB))
    for size in ("80.00 GiB", "30.00 GiB in tensors", "40.00 GiB reserved", "10.00 GiB are free"):
        assert size in text


# ---- the error ----


def test_a_lack_of_memory_is_named():
    with (
        pytest.raises(GpuMemoryError) as caught,
        naming("evaluation", MemorySettings(), so_far=lambda: "all saved", part=lambda: "x.weight"),
    ):
        raise RuntimeError(ON_CPU)
    text = str(caught.value)
    assert text.startswith("memory ran out: evaluation (x.weight); all saved. 3.00 GiB were wanted")
    assert "\n  - --optimizer_in_backward true" in text
    assert str(caught.value.__cause__) == ON_CPU


def test_the_closest_name_stays():
    run = MemorySettings()
    with (
        pytest.raises(GpuMemoryError, match="ran out: evaluation;"),
        naming(FORWARD, run),
        naming(lambda: "evaluation", run),
    ):
        raise RuntimeError(ON_CPU)


@pytest.mark.parametrize("error", [RuntimeError("a bug"), ValueError(ON_CPU), MemoryError()])
def test_other_errors_pass(error):
    with pytest.raises(type(error)) as caught, naming(FORWARD, MemorySettings()):
        raise error
    assert caught.value is error


class _Fails:
    """Asks for more memory than there is."""

    def __call__(self, *args, **kwargs):
        torch.empty(1 << 60, dtype=torch.uint8)


class _FailsInStep(_Fails):
    def __init__(self, step):
        self.left = step

    def __call__(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0:
            super().__call__()


def test_each_part_of_a_run_has_its_name(tiny_moe, tokenizer, tmp_path):
    arguments = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch"}
    trainer = make_trainer(tiny_moe, tokenizer, tmp_path, **arguments)
    trainer.compute_loss = _Fails()
    with pytest.raises(GpuMemoryError, match="micro-batch; 0 steps are done and no checkpoint"):
        trainer.train()
    trainer = make_trainer(tiny_moe, tokenizer, tmp_path, **arguments)
    trainer.create_optimizer().register_step_pre_hook(_FailsInStep(3))
    with pytest.raises(GpuMemoryError, match=r"update of the optimizer; 2 steps .*: checkpoint-2"):
        trainer.train()
    trainer.get_eval_dataloader = _Fails()
    with pytest.raises(GpuMemoryError, match="out: evaluation"):
        trainer.evaluate()


@pytest.mark.parametrize("in_backward", [False, True])
def test_the_warm_up_names_the_optimizer(tiny_moe, tokenizer, tmp_path, in_backward):
    trainer = make_trainer(
        tiny_moe, tokenizer, tmp_path, memory_warm_up=True, optim="adamw_torch",
        optimizer_in_backward=in_backward,
    )  # fmt: skip
    trainer.create_optimizer().register_step_pre_hook(_FailsInStep(1))
    first = r" \(update of model.embed_tokens.weight\)" if in_backward else ""
    with pytest.raises(GpuMemoryError, match=rf"out: states of the optimizer{first}; this is"):
        trainer.train()


_OUT_OF_ADDRESS_SPACE = """
import resource, sys
from pathlib import Path
from qwen3_sft.demo.model import tiny_config, tiny_model, train_tokenizer
from qwen3_sft.logs import set_up_logging
from tests.support.training import make_trainer
set_up_logging()
tokenizer = train_tokenizer(["some text"], 300)
model = tiny_model(tiny_config(len(tokenizer)))
trainer = make_trainer(
    model, tokenizer, Path(sys.argv[1]), max_steps=2, memory_warm_up=True, optim="adamw_torch",
    per_device_train_batch_size=4096,
)
in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (in_use + 2**29, resource.RLIM_INFINITY))
trainer.train()
"""


def test_memory_that_really_runs_out_does_so_before_the_first_step(tmp_path):
    result = run(sys.executable, "-c", _OUT_OF_ADDRESS_SPACE, tmp_path)
    assert result.returncode != 0
    assert f"GpuMemoryError: memory ran out: {FORWARD}; this is the memory warm-up" in result.stderr
    for text in (
        "nothing was trained yet", "GiB were wanted", "--activation_checkpointing selective",
        "--per_device_train_batch_size 2048 with --gradient_accumulation_steps 2",
    ):  # fmt: skip
        assert text in result.stderr
    assert not (tmp_path / "metrics.jsonl").read_text()

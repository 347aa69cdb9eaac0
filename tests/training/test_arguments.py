import os

import pytest

from qwen3_sft.distributed.engine import Engine
from qwen3_sft.errors import UsageError
from qwen3_sft.options.batch import accumulation_steps
from qwen3_sft.options.draft import TrainDraft
from qwen3_sft.options.recipe import parse_options
from qwen3_sft.training.arguments import completed, final_arguments


def finished(options, engine):
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return final_arguments(completed(options, engine, processes, has_bf16=False), engine)


def arguments(tmp_path, *words, engine="single"):
    least = ["--model_name_or_path", "m", "--dataset", "d", "--output_dir", str(tmp_path)]
    options = parse_options([*least, "--use_cpu", "true", *words])
    return finished(options, Engine(engine))


def test_global_batch_size_sets_the_accumulation(tmp_path):
    args = arguments(tmp_path, "--global_batch_size", "12", "--per_device_train_batch_size", "3")
    assert args.gradient_accumulation_steps == 4


def test_without_it_the_accumulation_is_as_given(tmp_path):
    assert (
        arguments(tmp_path, "--gradient_accumulation_steps", "5").gradient_accumulation_steps == 5
    )


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_step_has_as_many_rows_on_any_number_of_processes(world_size):
    draft = TrainDraft(
        global_batch_size=16, per_device_train_batch_size=2, gradient_accumulation_steps=1
    )
    assert accumulation_steps(draft, world_size) * 2 * world_size == 16


def test_the_rows_of_a_step_are_counted_over_the_processes_of_the_launcher(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UsageError, match=r"not a multiple of 3 rows \(3 processes x"):
        arguments(tmp_path, "--global_batch_size", "4")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--global_batch_size", "7", "--per_device_train_batch_size", "3"),
            r"--global_batch_size 7 is not a multiple of 3 rows \(1 processes x .* 3\); "
            "the nearest are 6 and 9",
        ),
        (("--global_batch_size", "0"), "--global_batch_size 0: must be at least 1"),
        (("--global_batch_size", "4", "--gradient_accumulation_steps", "2"), "both set"),
        (("--eval_strategy", "steps"), "without evaluation data"),
        (("--early_stopping_patience", "2"), "needs --load_best_model_at_end"),
    ],
)
def test_refused(tmp_path, words, message):
    with pytest.raises(UsageError, match=message):
        arguments(tmp_path, *words)


def test_deepspeed_is_not_switched_off_in_silence(tmp_path):
    with pytest.raises(UsageError, match="--use_cpu true would switch DeepSpeed off"):
        arguments(tmp_path, engine="zero3")


def test_low_bit_optimizers_are_refused_on_sharded_weights(tmp_path):
    with pytest.raises(UsageError, match="--optim adamw_torch_8bit is not tested on sharded"):
        arguments(tmp_path, "--optim", "adamw_torch_8bit", engine="native")


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_deepspeed_checkpoints_without_their_weights_are_refused(engine):
    options = parse_options(["--model_name_or_path", "m", "--dataset", "d"])
    options = options.replaced(save_only_model=True)
    with pytest.raises(UsageError, match="--save_only_model true: DeepSpeed's checkpoints hold"):
        completed(options, Engine(engine), 1, has_bf16=False)


def test_an_optimizer_that_mixes_whole_and_sharded_tensors_is_refused(tmp_path):
    with pytest.raises(UsageError, match="--optim adafactor is not tested on sharded"):
        arguments(tmp_path, "--optim", "adafactor", engine="native")


def test_ddp_does_not_look_for_unused_parameters(tmp_path):
    assert arguments(tmp_path).ddp_find_unused_parameters is False
    asked = arguments(tmp_path, "--ddp_find_unused_parameters", "true")
    assert asked.ddp_find_unused_parameters is True

"""What options leave open is filled in, what contradicts is refused, then the TrainingArguments."""

from __future__ import annotations

import importlib.util
import logging
import os
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import DistributedType
from transformers import set_seed

from qwen3_sft.distributed.engine import Engine
from qwen3_sft.errors import UsageError
from qwen3_sft.model.layer_compile import check_compile
from qwen3_sft.optimizers.choice import check_optimizer_choice, choose_optimizer, optimizer_name
from qwen3_sft.options.batch import accumulation_steps
from qwen3_sft.options.draft import TrainDraft
from qwen3_sft.options.recipe import Options
from qwen3_sft.options.train_args import TrainArguments
from qwen3_sft.options.values import package_of_optimizer
from qwen3_sft.training.upstream_checks import check_reporters

logger = logging.getLogger(__name__)


def completed(options: Options, engine: Engine, world_size: int, *, has_bf16: bool) -> Options:
    """Return the options with the defaults that depend on device, data and number of processes.

    Args:
        options: of the run.
        engine: what spreads it over processes.
        world_size: processes.
        has_bf16: whether the run computes on a GPU that knows bfloat16.

    Raises:
        UsageError: options that contradict each other, the device or the number of processes.
    """
    train = options.train
    if options.model.dtype == "auto" and has_bf16 and not train.use_cpu:
        train = replace(train, bf16=True)
    if options.model.dtype == "bfloat16" and engine.layout == "zero":
        train = replace(train, bf16=True)  # DeepSpeed's name for weights in bfloat16
    if train.accelerator_config is None:
        train = replace(train, accelerator_config={"non_blocking": True})  # copied ahead
    if train.ddp_find_unused_parameters is None:  # every expert gets a gradient, zeros if idle
        train = replace(train, ddp_find_unused_parameters=False)
    train = replace(train, gradient_accumulation_steps=accumulation_steps(train, world_size))
    train = _with_evaluation(train, has_eval=options.data.has_evaluation)
    if train.save_strategy == "best" and train.metric_for_best_model is None:
        train = replace(train, metric_for_best_model="loss")  # as upstream, for the best at the end
    _check_engine(train, engine)
    choice = choose_optimizer(options, engine)
    check_optimizer_choice(train, choice, engine)
    train = replace(train, optim_args=choice.optim_args)
    check_compile(options, engine)
    # Norms and RoPE are left to the compiler.
    liger = {"use_liger": False} if train.torch_compile else {}
    return replace(options, train=train).replaced(**liger)


def check_packages(train: TrainDraft, engine: Engine) -> None:
    """Refuse what needs packages that are not here.

    Raises:
        UsageError: naming what to install.
    """
    if engine.layout == "zero" and importlib.util.find_spec("deepspeed") is None:
        raise UsageError("the launch file needs DeepSpeed: pip install deepspeed")
    optim = optimizer_name(train)
    module = package_of_optimizer(optim)
    if module is not None and importlib.util.find_spec(module) is None:
        raise UsageError(f"--optim {optim}: {module} is not installed; pip install it")
    check_reporters(train)


def check_machine(train: TrainDraft) -> None:
    """Refuse what this machine cannot compute; a plan is for another one, and does not ask.

    Raises:
        UsageError: naming the option.
    """
    has_gpu = torch.cuda.is_available() and not train.use_cpu
    for name in ("fp16", "tf32"):
        if getattr(train, name) and not has_gpu:
            raise UsageError(f"--{name} true: needs a GPU, and none is used here; leave it out")
    if train.bf16 and not train.use_cpu and not (has_gpu and torch.cuda.is_bf16_supported()):
        raise UsageError(
            "--bf16 true: there is no GPU here that computes in bfloat16; leave it out, or set "
            "--use_cpu true"
        )


def final_arguments(options: Options, engine: Engine) -> TrainArguments:
    """Build the arguments, which joins the process group, and begin all random numbers.

    Args:
        options: completed.
        engine: what spreads the run over processes.

    Raises:
        UsageError: transformers refuses a value, several GPUs are visible to one process, or the
            processes would train apart.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    with_gpus = torch.cuda.is_available() and not options.train.use_cpu
    train = options.train if with_gpus or launched == 1 else _on_cpus(options.train, engine)
    args = train.arguments()
    _check_together(args, launched)
    if args.n_gpu > 1:
        raise UsageError(
            f"{args.n_gpu} GPUs are visible to one process: launch with config/ddp.json, or choose "
            "one with CUDA_VISIBLE_DEVICES=0"
        )
    rounds = choose_optimizer(options, engine).rounds_stochastically
    if options.model.dtype == "bfloat16" and engine.layout != "zero" and not rounds:
        logger.warning(
            "weights in bfloat16: small updates are rounded away; --dtype auto keeps them, and so "
            "does --optim adamw_torch_8bit in one process or DDP, which rounds stochastically"
        )
    set_seed(args.seed)
    return args


def _on_cpus(train: TrainDraft, engine: Engine) -> TrainDraft:
    """Have accelerate make one group of processes without GPUs, which it does not by itself.

    What is set here is for this machine, and so in no recipe that the run leaves.

    Raises:
        UsageError: the engine needs GPUs.
    """
    if engine.kind in ("ddp", "native"):
        return replace(train, use_cpu=True)
    if engine.kind == "fsdp" and "ACCELERATE_TORCH_DEVICE" not in os.environ:
        raise UsageError(
            "accelerate's FSDP needs GPUs, and there is none here: launch with config/ddp.json, "
            "with --fsdp_size -1 if the weights are to be sharded"
        )
    return replace(train, ddp_backend=train.ddp_backend or "gloo")


def _check_together(args: TrainArguments, launched: int) -> None:
    """Compare what the launcher started with what accelerate found: each would train alone.

    Raises:
        UsageError: they differ.
    """
    state: Any = args.distributed_state
    is_apart = launched > 1 and state.distributed_type == DistributedType.NO
    if args.world_size != launched or is_apart:
        raise UsageError(
            f"the launcher started {launched} processes, and accelerate sees "
            f"{1 if is_apart else args.world_size}: each would train alone. Launch with accelerate "
            "launch and one of config/*.json, or torchrun, and leave --ddp_backend out"
        )


def _with_evaluation(train: TrainDraft, *, has_eval: bool) -> TrainDraft:
    """Evaluate as often as a checkpoint is written unless the recipe says otherwise."""
    strategy = str(train.eval_strategy)
    if train.early_stopping_patience is not None and not train.load_best_model_at_end:
        raise UsageError("--early_stopping_patience needs --load_best_model_at_end true")
    if has_eval and strategy == "no" and train.save_strategy in ("steps", "epoch"):
        return replace(train, eval_strategy=train.save_strategy, eval_steps=train.save_steps)
    if not has_eval and strategy != "no":
        raise UsageError(
            f"--eval_strategy {strategy} without evaluation data: set --eval_fraction or "
            "--eval_dataset"
        )
    return train


def _check_engine(train: TrainDraft, engine: Engine) -> None:
    """Refuse what DeepSpeed would ignore or fail on much later.

    Raises:
        UsageError: naming the option.
    """
    if engine.layout != "zero":
        return
    if train.use_cpu:
        raise UsageError(
            "--use_cpu true would switch DeepSpeed off in silence; set the environment "
            "variable DS_ACCELERATOR=cpu instead and leave --use_cpu out"
        )
    if train.save_only_model:
        raise UsageError(
            "--save_only_model true: DeepSpeed's checkpoints hold the weights in the parts of "
            "its optimizer; leave it out, the final model is exported without the optimizer"
        )

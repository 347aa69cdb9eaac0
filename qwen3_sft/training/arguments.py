"""The defaults that depend on device, data and number of processes, then the TrainingArguments."""

from __future__ import annotations

import importlib.util
import logging
import os
from typing import Any

import torch
from transformers import set_seed

from qwen3_sft.distributed.engine import Engine
from qwen3_sft.errors import UsageError
from qwen3_sft.model.layer_compile import check_compile
from qwen3_sft.options.args import TrainArguments
from qwen3_sft.options.recipe import Options

logger = logging.getLogger(__name__)

# Reporters by the modules that serve them; transformers knows some more.
_REPORTERS = {
    "wandb": ("wandb",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "mlflow": ("mlflow",),
    "trackio": ("trackio",),
}


def final_arguments(options: Options, engine: Engine, *, has_eval: bool) -> TrainArguments:
    """Fill in what was left open and build the arguments, which joins the process group.

    Args:
        options: of the run; `train_values` are completed in place.
        engine: what spreads the run over processes.
        has_eval: whether there are samples to evaluate on.

    Raises:
        UsageError: options that contradict each other, the device or the number of processes.
    """
    values = options.train_values
    _check_reporters(values)
    if options.model.dtype == "auto" and torch.cuda.is_available() and not values["use_cpu"]:
        values["bf16"] = torch.cuda.is_bf16_supported()
    if options.model.dtype == "bfloat16" and engine.layout == "zero":
        values["bf16"] = True  # DeepSpeed's name for weights in bfloat16
    if values["accelerator_config"] is None:
        values["accelerator_config"] = {"non_blocking": True}  # batches are copied ahead
    if values["ddp_find_unused_parameters"] is None:
        values["ddp_find_unused_parameters"] = False  # every expert gets a gradient, zeros if idle
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    values["gradient_accumulation_steps"] = accumulation_steps(values, world_size)
    _default_evaluation(values, has_eval=has_eval)
    _check_engine(values, engine)
    _check_backward_optimizer(values, engine)
    check_compile(options, engine)
    values["optim_args"] = optimizer_arguments(options, engine)
    args = options.train_arguments()
    if args.n_gpu > 1:
        raise UsageError(
            f"{args.n_gpu} GPUs are visible to one process: launch with config/ddp.json, or choose "
            "one with CUDA_VISIBLE_DEVICES=0"
        )
    if (
        options.model.dtype == "bfloat16"
        and engine.layout != "zero"
        and not _rounds_stochastically(values)
    ):
        logger.warning(
            "weights in bfloat16: small updates are rounded away; --dtype auto keeps them, and so "
            "does --optim adamw_torch_8bit in one process, which rounds stochastically"
        )
    set_seed(args.seed)
    return args


def _check_reporters(values: dict[str, Any]) -> None:
    for reporter in values["report_to"]:
        modules = _REPORTERS.get(reporter, ())
        if modules and not any(importlib.util.find_spec(name) for name in modules):
            raise UsageError(f"--report_to {reporter}: not installed; pip install {reporter}")


def accumulation_steps(values: dict[str, Any], world_size: int) -> int:
    """Return the micro-batches of a step, from the rows of a step if those are given.

    Raises:
        UsageError: they do not divide, or both are given.
    """
    rows, given = values["global_batch_size"], values["gradient_accumulation_steps"]
    if rows is None:
        return given
    if given != 1:
        raise UsageError(
            "--global_batch_size and --gradient_accumulation_steps are both set: leave one out"
        )
    at_once = world_size * values["per_device_train_batch_size"]
    if rows < 1 or rows % at_once:
        fits = max(rows // at_once, 1) * at_once
        raise UsageError(
            f"--global_batch_size {rows} is not a multiple of {at_once} rows ({world_size} "
            f"processes x per_device_train_batch_size {values['per_device_train_batch_size']}); "
            f"the nearest are {fits} and {fits + at_once}"
        )
    return rows // at_once


def _default_evaluation(values: dict[str, Any], *, has_eval: bool) -> None:
    """Evaluate as often as a checkpoint is written unless the recipe says otherwise."""
    strategy = str(values["eval_strategy"])
    if has_eval and strategy == "no" and values["save_strategy"] in ("steps", "epoch"):
        values |= {"eval_strategy": values["save_strategy"], "eval_steps": values["save_steps"]}
    elif not has_eval and strategy != "no":
        raise UsageError(
            f"--eval_strategy {strategy} without evaluation data: set --eval_fraction or "
            "--eval_dataset"
        )
    if values["early_stopping_patience"] is not None and not values["load_best_model_at_end"]:
        raise UsageError("--early_stopping_patience needs --load_best_model_at_end true")


def _check_engine(values: dict[str, Any], engine: Engine) -> None:
    """Refuse what an engine would ignore or fail on much later.

    Raises:
        UsageError: naming the option.
    """
    if engine.layout == "zero":
        if importlib.util.find_spec("deepspeed") is None:
            raise UsageError("the launch file needs DeepSpeed: pip install deepspeed")
        if values["use_cpu"]:
            raise UsageError(
                "--use_cpu true would switch DeepSpeed off in silence; set the environment "
                "variable DS_ACCELERATOR=cpu instead and leave --use_cpu out"
            )
        if values["save_only_model"]:
            raise UsageError(
                "--save_only_model true: DeepSpeed's checkpoints hold the weights in the parts of "
                "its optimizer; leave it out, the final model is exported without the optimizer"
            )
    optimizer = optimizer_name(values)
    if engine.shards_weights and ("8bit" in optimizer or "adafactor" in optimizer):
        raise UsageError(
            f"--optim {optimizer} is not tested on sharded weights; use adamw_torch_fused"
        )


def optimizer_name(values: dict[str, Any]) -> str:
    """Return the name behind --optim, which is an enum by default and a word if it was given."""
    return str(getattr(values["optim"], "value", values["optim"]))


# Optimizers whose step may run within the backward pass (optimizers/in_backward.py).
_IN_BACKWARD = (
    "adamw_torch_8bit", "adamw_torch_4bit", "adafactor", "adamw_torch", "adamw_torch_fused",
)  # fmt: skip


def _check_backward_optimizer(values: dict[str, Any], engine: Engine) -> None:
    """Refuse what an update within the backward pass cannot do.

    Raises:
        UsageError: naming the option and what to use instead.
    """
    clip, max_norm = values["clip"], values["max_grad_norm"]
    if not values["optimizer_in_backward"]:
        if clip != "global":
            raise UsageError(f"--clip {clip} is for --optimizer_in_backward true; leave it out")
        return
    name = "--optimizer_in_backward true"
    if engine.kind != "single":
        raise UsageError(
            f"{name} is for one process and this is {engine}: launch with config/single.json, or "
            "leave it out, since shards of gradients take little room"
        )
    if values["gradient_accumulation_steps"] != 1:
        raise UsageError(
            f"{name} updates after every micro-batch, so gradient_accumulation_steps "
            f"{values['gradient_accumulation_steps']} cannot be: set "
            "--per_device_train_batch_size instead, or keep full gradients with --optim adafactor "
            "and without --optimizer_in_backward"
        )
    if clip == "global" and max_norm > 0:
        raise UsageError(
            f"{name} cannot clip by the norm of all gradients, which is known only after the "
            f"last update (--clip global, --max_grad_norm {max_norm}): set --clip per_tensor or "
            "--clip delayed, or --max_grad_norm 0; for the exact clip keep full gradients with "
            "--optim adafactor and without --optimizer_in_backward"
        )
    if values["fp16"]:
        raise UsageError(f"{name} has no loss scaling: set --bf16 true instead of --fp16")
    optim = optimizer_name(values)
    if optim not in _IN_BACKWARD:
        raise UsageError(f"{name} does not know --optim {optim}: use one of {list(_IN_BACKWARD)}")


def optimizer_arguments(options: Options, engine: Engine) -> str | None:
    """Return --optim_args with stochastic rounding, unless they say something of it themselves.

    Without it, which is the optimizers' default, bfloat16 weights lose most updates.
    """
    values = options.train_values
    optim, given = optimizer_name(values), values["optim_args"]
    can = optim in ("adamw_torch_8bit", "adamw_torch_4bit")
    # In the backward pass Adafactor steps in slices whatever its class.
    can = can or (optim == "adafactor" and not values["optimizer_in_backward"])
    is_alone = engine.kind == "single" and options.model.dtype == "bfloat16"
    if not (can and is_alone) or "bf16_stochastic_round" in str(given):
        return given
    return ",".join(filter(None, [given, "bf16_stochastic_round=True"]))


def _rounds_stochastically(values: dict[str, Any]) -> bool:
    optim = optimizer_name(values)
    if values["optimizer_in_backward"] and optim == "adafactor":
        return True
    return "bf16_stochastic_round=true" in str(values["optim_args"]).lower()

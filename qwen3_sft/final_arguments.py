"""The defaults that depend on device, data and number of processes, then the TrainingArguments."""

from __future__ import annotations

import importlib.util
import logging
import os
from typing import Any

import torch
from transformers import set_seed

from qwen3_sft.args import TrainArguments
from qwen3_sft.engine import Engine
from qwen3_sft.recipe import Options, UsageError

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
    _accumulate(values, int(os.environ.get("WORLD_SIZE", "1")))
    _default_evaluation(values, has_eval=has_eval)
    _check_engine(values, engine)
    args = options.train_arguments()
    if args.n_gpu > 1:
        raise UsageError(
            f"{args.n_gpu} GPUs are visible to one process: launch with config/ddp.json, or choose "
            "one with CUDA_VISIBLE_DEVICES=0"
        )
    if options.model.dtype == "bfloat16" and engine.layout != "zero":
        logger.warning(
            "weights in bfloat16: AdamW's small updates are rounded away; --dtype auto keeps them"
        )
    set_seed(args.seed)
    return args


def _check_reporters(values: dict[str, Any]) -> None:
    for reporter in values["report_to"]:
        modules = _REPORTERS.get(reporter, ())
        if modules and not any(importlib.util.find_spec(name) for name in modules):
            raise UsageError(f"--report_to {reporter}: not installed; pip install {reporter}")


def _accumulate(values: dict[str, Any], world_size: int) -> None:
    """Turn the rows of a step into micro-batches per process.

    Raises:
        UsageError: they do not divide, or both are given.
    """
    rows = values["global_batch_size"]
    if rows is None:
        return
    if values["gradient_accumulation_steps"] != 1:
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
    values["gradient_accumulation_steps"] = rows // at_once


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
    if engine.shards_weights and "8bit" in str(values["optim"]):
        raise UsageError(
            f"--optim {values['optim']} is not tested on sharded weights; use adamw_torch_fused"
        )

"""One run, top to bottom: options -> tokens -> model -> patches -> trainer -> export."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import os
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, set_seed

import monkey_patch
from qwen3_sft.args import DataArguments, TrainArguments
from qwen3_sft.build import build_trainer
from qwen3_sft.checkpoint import CheckpointError
from qwen3_sft.completions import before_and_after
from qwen3_sft.data.formats import DataError
from qwen3_sft.data.prepare import TokenDataset, prepare
from qwen3_sft.demo.build import resolve_demo
from qwen3_sft.dry_run import dry_run
from qwen3_sft.export import export_model
from qwen3_sft.export_check import ExportError
from qwen3_sft.hardware import device_info
from qwen3_sft.isolation import LeakError, check_isolation
from qwen3_sft.model import (
    ModelError,
    choose_attention,
    load_model,
    load_tokenizer,
    resolve_model,
    weights_dtype,
)
from qwen3_sft.patches import choose_patches
from qwen3_sft.recipe import Options, UsageError, help_text, parse_options
from qwen3_sft.run_folder import RunFolder, choose_checkpoint, versions
from qwen3_sft.trainer import NonFiniteError, SftTrainer

logger = logging.getLogger(__name__)

# Reporters by the modules that serve them; transformers knows some more.
_REPORTERS = {
    "wandb": ("wandb",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "mlflow": ("mlflow",),
    "trackio": ("trackio",),
}
# Mistakes of the user's: a message without a traceback, exit code 2.
_USER_ERRORS = (UsageError, DataError, ModelError)
# What went wrong inside a run: a message without a traceback, exit code 1.
_RUN_ERRORS = (
    CheckpointError, ExportError, LeakError, NonFiniteError, monkey_patch.PatchError,
)  # fmt: skip


def run_command(argv: list[str]) -> int:
    """Run a command line; mistakes become a message and an exit code, not a traceback."""
    try:
        if "--help" in argv or "-h" in argv:
            logger.info("%s", help_text())
            return 0
        options = parse_options(argv)
        if options.train_values["dry_run"]:
            for line in dry_run(options):
                logger.info("%s", line)
            return 0
        return run(options)
    except _USER_ERRORS as error:
        logger.error("error: %s", error)
        return 2
    except _RUN_ERRORS as error:
        logger.error("%s: %s", type(error).__name__, error)
        return 1


def run(options: Options) -> int:
    """Train one recipe into its run folder, or say that this has been done."""
    _refuse_engines()
    folder = RunFolder(options.output_dir)
    if summary := folder.summary():
        logger.info("%s", _finished(folder, summary))
        return 0
    checkpoint = choose_checkpoint(folder, options.train_values["resume"])
    folder.create()
    name, data = resolve_demo(options.model.model_name_or_path, options.data, folder.path / "base")
    base = resolve_model(name, options.model.model_revision)
    tokenizer = load_tokenizer(base)
    # Before TrainingArguments exist, hence outside any process group: this may take hours.
    train_tokens, eval_tokens = _prepare_data(data, tokenizer, options.train_values["seed"])

    args = _train_arguments(options, has_eval=eval_tokens is not None)
    weights = weights_dtype(options.model)
    compute = torch.bfloat16 if args.bf16 else weights
    attention, reason = choose_attention(options.model.attn_implementation, args.device, compute)
    logger.info("attention: %s (%s)", attention, reason)
    model: Any = load_model(base, options.model, args.device, weights, attention)
    patches = monkey_patch.apply_patches(model, choose_patches(options.model, attention))
    model.to(args.device)

    trainer = build_trainer(
        args, model, tokenizer, train_tokens, eval_tokens, data, folder, checkpoint
    )
    if trainer.is_world_process_zero():
        _write_records(folder, options, trainer, patches.counts, attention)
        folder.write_json("data_report.json", train_tokens.report)
        if data.eval_dataset and eval_tokens is not None:
            folder.write_json("eval_data_report.json", eval_tokens.report)
    report = check_isolation(
        model, trainer.first_row(), data.max_length, tokenizer.pad_token_id,
        autocast=torch.bfloat16 if args.bf16 else None,
    )  # fmt: skip
    logger.info("%s", report)
    if checkpoint is not None:
        logger.info("resuming from %s", checkpoint)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    _finish(trainer, options, base, folder)
    return 0


def _refuse_engines() -> None:
    """Raise for engines that accelerate would switch on but this version does not support yet."""
    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("1", "true"):
            raise UsageError(
                f"not available yet: {name} (asked for by the accelerate config); launch with "
                "config/single.json or config/ddp.json"
            )


def _finished(folder: RunFolder, summary: dict[str, Any]) -> str:
    return (
        f"{folder.path} holds a finished run: {summary['steps']} steps, "
        f"final loss {summary['loss']:.4f}, model in {folder.model}\n"
        f"{before_and_after(folder.samples)}\n"
        "Nothing was changed. To train again choose another --output_dir, or remove the folder."
    )


def _prepare_data(
    data: DataArguments, tokenizer: PreTrainedTokenizerBase, seed: int
) -> tuple[TokenDataset, TokenDataset | None]:
    tokens = prepare(data, tokenizer)
    if data.eval_dataset:
        return tokens, prepare(data, tokenizer, eval=True)
    if data.eval_fraction:
        return tokens.split(data.eval_fraction, seed)
    return tokens, None


def _train_arguments(options: Options, *, has_eval: bool) -> TrainArguments:
    """Fill in the defaults that depend on device and data, then join the process group."""
    values = options.train_values
    for reporter in values["report_to"]:
        modules = _REPORTERS.get(reporter, ())
        if modules and not any(importlib.util.find_spec(name) for name in modules):
            raise UsageError(f"--report_to {reporter}: not installed; pip install {reporter}")
    if options.model.dtype == "auto" and torch.cuda.is_available() and not values["use_cpu"]:
        values["bf16"] = torch.cuda.is_bf16_supported()
    if values["accelerator_config"] is None:
        values["accelerator_config"] = {"non_blocking": True}  # batches are copied ahead
    _default_evaluation(values, has_eval=has_eval)
    args = options.train_arguments()
    if args.n_gpu > 1:
        raise UsageError(
            f"{args.n_gpu} GPUs are visible to one process: launch with config/ddp.json, or choose "
            "one with CUDA_VISIBLE_DEVICES=0"
        )
    if options.model.dtype == "bfloat16":
        logger.warning(
            "weights in bfloat16: AdamW's small updates are rounded away; --dtype auto keeps them"
        )
    set_seed(args.seed)
    return args


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


def _write_records(
    folder: RunFolder,
    options: Options,
    trainer: SftTrainer,
    patches: dict[str, int],
    attention: str,
) -> None:
    info = device_info()
    folder.write_config(options.resolved())
    folder.write_json(
        "environment.json",
        {
            "versions": versions(),
            "device": dataclasses.asdict(info),
            "world_size": trainer.args.world_size,
            "weights_dtype": str(trainer.model.dtype),
            "autocast_dtype": "bfloat16" if trainer.args.bf16 else None,
            "attn_implementation": attention,
            "patches": patches,
        },
    )


def _finish(trainer: SftTrainer, options: Options, base: Path, folder: RunFolder) -> None:
    """Export the model, say what happened, and mark the run as finished."""
    if trainer.is_world_process_zero():
        dtype = options.model.export_dtype
        export_model(
            trainer.accelerator.unwrap_model(trainer.model), base, folder.model,
            None if dtype == "auto" else getattr(torch, dtype),
        )  # fmt: skip
        records = [entry for entry in trainer.state.log_history if "loss" in entry]
        summary = {
            "finished": True,
            "steps": trainer.state.global_step,
            "first_loss": records[0]["loss"],
            "loss": records[-1]["loss"],
            "best_metric": trainer.state.best_metric,
            "skipped_steps": trainer.skipped_steps,
            "model": str(folder.model),
        }
        folder.write_json("summary.json", summary)
        logger.info(
            "done: loss %.4f -> %.4f in %d steps, model in %s\n%s", summary["first_loss"],
            summary["loss"], summary["steps"], folder.model, before_and_after(folder.samples),
        )  # fmt: skip
    trainer.accelerator.wait_for_everyone()

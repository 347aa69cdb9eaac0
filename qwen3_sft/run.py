"""One run, top to bottom: options -> tokens -> model -> patches -> trainer -> export."""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

import monkey_patch
from monkey_patch.fp8_selection import Selection, describe
from qwen3_sft.build import build_trainer
from qwen3_sft.checkpoints.resume import (
    agree_on_checkpoint,
    check_allowed,
    check_resume,
    run_identity,
)
from qwen3_sft.checkpoints.save import rows_per_step
from qwen3_sft.data.prepare import TokenDataset, prepare
from qwen3_sft.demo.build import resolve_demo
from qwen3_sft.distributed.engine import Engine, check_experts, deepspeed_config, detect
from qwen3_sft.distributed.peer_watch import PeerWatch
from qwen3_sft.distributed.process_group import join_process_group, leave_process_group
from qwen3_sft.distributed.rank_zero import on_first_rank
from qwen3_sft.dry_run import dry_run
from qwen3_sft.errors import DONE, INTERRUPTED, Interrupted, exit_code_of
from qwen3_sft.export.export import export_model
from qwen3_sft.hardware import device_info
from qwen3_sft.model.fp8 import choose_fp8
from qwen3_sft.model.loading import (
    choose_attention,
    load_model,
    load_tokenizer,
    num_experts,
    resolve_model,
    weights_dtype,
)
from qwen3_sft.model.meta_model import meta_model
from qwen3_sft.model.patches import FP8_PATCHES, choose_patches, fp8_selection
from qwen3_sft.options.args import DataArguments, TrainArguments
from qwen3_sft.options.recipe import Options, help_text, parse_options
from qwen3_sft.plan.advice import MemorySettings
from qwen3_sft.plan.nearest import describe_advice, nearest
from qwen3_sft.plan.plan import RunPlan
from qwen3_sft.plan.planner import experts_for, plan_here
from qwen3_sft.plan.zero3_units import check_zero3
from qwen3_sft.plan.zero3_units import describe as describe_units
from qwen3_sft.records.run_folder import RunFolder, versions
from qwen3_sft.training.arguments import final_arguments
from qwen3_sft.training.callbacks import TellStep
from qwen3_sft.training.out_of_memory import naming
from qwen3_sft.training.summary import describe_summary, write_summary
from qwen3_sft.training.trainer import SftTrainer

logger = logging.getLogger(__name__)


def run_command(argv: list[str]) -> int:
    """Run a command line; mistakes become a message and an exit code, not a traceback."""
    return exit_code_of(lambda: _run_command(argv), logger.error, also=(monkey_patch.PatchError,))


def _run_command(argv: list[str]) -> int:
    if "--help" in argv or "-h" in argv:
        logger.info("%s", help_text())
        return DONE
    options = parse_options(argv)
    if options.train_values["dry_run"]:
        for line in dry_run(options):
            logger.info("%s", line)
        return DONE
    with PeerWatch() as peers:
        return run(options, peers)


def run(options: Options, peers: PeerWatch) -> int:
    """Train one recipe into its run folder, or say that this has been done; return the exit code.

    That is 75 where a signal has interrupted training, which is then saved.
    """
    engine = detect(options.model, options.data)
    folder = RunFolder(options.output_dir)
    if summary := folder.summary():
        logger.info("%s", describe_summary(folder, summary))
        return DONE
    check_resume(folder, options.train_values["resume"])
    check_allowed(options.train_values["allow_change"])
    folder.create()
    name, data = resolve_demo(options.model.model_name_or_path, options.data, folder.path / "base")
    base = resolve_model(name, options.model.model_revision)
    check_experts(engine, num_experts(base))
    # Before TrainingArguments exist: then even a plan would be sharded.
    plan = _plan(options, engine, base)
    tokenizer = load_tokenizer(base)
    # Before TrainingArguments exist, hence outside any process group: this may take hours.
    train_tokens, eval_tokens = _prepare_data(data, tokenizer, options.train_values["seed"])

    values = options.train_values
    _join(values, peers)
    plan = on_first_rank(lambda: plan)  # GPUs may differ, what layers do must not
    options.model.experts_implementation = experts_for(
        options.model.experts_implementation, plan.layers
    )
    args = final_arguments(options, engine, has_eval=eval_tokens is not None)
    identity = run_identity(args, data, train_tokens.report["fingerprints"], rows_per_step(args))
    checkpoint = agree_on_checkpoint(folder, args, engine, identity)
    loaded = _load(base, options, args, engine, data)
    trainer = build_trainer(
        args, loaded.model, tokenizer, train_tokens, eval_tokens, data, folder, checkpoint, plan,
        identity,
    )  # fmt: skip
    trainer.add_callback(TellStep(peers))
    if trainer.is_world_process_zero():
        _write_records(folder, options, trainer, loaded)
        folder.write_json("data_report.json", train_tokens.report)
        if data.eval_dataset and eval_tokens is not None:
            folder.write_json("eval_data_report.json", eval_tokens.report)
    is_whole = _train(trainer, checkpoint)
    if is_whole and args.stop_after_steps is None:
        with loaded.patches.paused(*FP8_PATCHES):  # whoever loads the model will compute without
            _finish(trainer, options, base, folder)
    peers.leave()
    leave_process_group()
    return DONE if is_whole else INTERRUPTED


@dataclasses.dataclass(frozen=True)
class _Loaded:
    """A patched model, and what was chosen for it."""

    model: Any
    patches: monkey_patch.AppliedPatches
    attention: str
    fp8: Selection | None


def _load(
    base: Path, options: Options, args: TrainArguments, engine: Engine, data: DataArguments
) -> _Loaded:
    """Read the weights and patch the model."""
    compute = torch.bfloat16 if args.bf16 else weights_dtype(options.model)
    weights = weights_dtype(options.model, engine, compute)
    attention, reason = choose_attention(options.model.attn_implementation, args.device, compute)
    logger.info("engine: %s; attention: %s (%s)", engine, attention, reason)
    fp8 = choose_fp8(options.model, args.device, packing=data.packing)
    with naming("loading the weights", MemorySettings.of(args, engine, data.max_length)):
        model: Any = load_model(
            base, options.model, args.device, weights, attention, engine=engine, compute=compute
        )
        selection = fp8_selection(model, options.model, fp8)
        if selection is not None:
            logger.info("%s", describe(selection))
        patches = monkey_patch.apply_patches(model, choose_patches(options.model, attention, fp8))
        if engine.layout == "whole":
            model.to(args.device)
    return _Loaded(model, patches, attention, selection)


def _train(trainer: SftTrainer, checkpoint: Path | None) -> bool:
    """Train; return whether it came to its end, and was not interrupted by a signal."""
    if checkpoint is not None:
        logger.info("resuming from %s", checkpoint)
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except Interrupted as interrupted:
        logger.info("%s", interrupted)
        return False
    return True


def _join(values: dict[str, Any], peers: PeerWatch) -> None:
    """Meet the other processes and begin to watch them, if there are any."""
    backend = "gloo" if values["use_cpu"] else values["ddp_backend"]
    if store := join_process_group(values["dist_timeout_s"], backend):
        peers.start(store, dist.get_rank(), dist.get_world_size())


def _plan(options: Options, engine: Engine, base: Path) -> RunPlan:
    """Plan and say so; a plan that does not fit is a warning, since only the GPU knows."""
    on_meta = meta_model(str(base))
    if engine.kind == "zero3":
        logger.info("%s", describe_units(check_zero3(on_meta, deepspeed_config())))
    plan = plan_here(on_meta, options, engine)
    for line in plan.lines():
        logger.info("%s", line)
    if plan.fits is False and os.environ.get("RANK", "0") == "0":
        advice = nearest(options, engine, lambda o: plan_here(on_meta, o, engine))
        logger.warning("this is likely to run out of memory; %s", describe_advice(advice))
    return plan


def _prepare_data(
    data: DataArguments, tokenizer: PreTrainedTokenizerBase, seed: int
) -> tuple[TokenDataset, TokenDataset | None]:
    tokens = prepare(data, tokenizer)
    if data.eval_dataset:
        return tokens, prepare(data, tokenizer, eval=True)
    if data.eval_fraction:
        return tokens.split(data.eval_fraction, seed)
    return tokens, None


def _write_records(
    folder: RunFolder, options: Options, trainer: SftTrainer, loaded: _Loaded
) -> None:
    info = device_info()
    folder.write_config(options.resolved())
    folder.write_json(
        "environment.json",
        {
            "versions": versions(),
            "device": dataclasses.asdict(info),
            "engine": dataclasses.asdict(trainer.engine),
            "world_size": trainer.args.world_size,
            "weights_dtype": str(trainer.model.dtype),
            "autocast_dtype": "bfloat16" if trainer.args.bf16 else None,
            "attn_implementation": loaded.attention,
            "patches": loaded.patches.counts,
            "fp8": None if loaded.fp8 is None else dataclasses.asdict(loaded.fp8),
        },
    )


def _finish(trainer: SftTrainer, options: Options, base: Path, folder: RunFolder) -> None:
    """Export the model, say what happened, and mark the run as finished."""
    dtype = options.model.export_dtype
    export_model(
        trainer.accelerator.unwrap_model(trainer.model), base, folder.model,
        None if dtype == "auto" else getattr(torch, dtype),
    )  # fmt: skip
    if trainer.is_world_process_zero():
        logger.info("%s", write_summary(trainer, folder))
    trainer.accelerator.wait_for_everyone()

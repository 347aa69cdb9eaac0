"""One run, top to bottom: options -> tokens -> model -> patches -> trainer -> export."""

from __future__ import annotations

import logging
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import monkey_patch
from qwen3_sft.build import build_trainer
from qwen3_sft.checkpoints.resume import agree_on_checkpoint, run_identity
from qwen3_sft.data.tokens import Tokens, prepare_tokens
from qwen3_sft.decisions import (
    Decisions,
    Machine,
    check_disk,
    check_model,
    check_options,
    decide,
    with_plan,
)
from qwen3_sft.demo.build import resolve_demo
from qwen3_sft.distributed.peer_watch import PeerWatch
from qwen3_sft.distributed.process_group import join_process_group, leave_process_group
from qwen3_sft.distributed.rank_zero import on_first_rank
from qwen3_sft.dry_run import dry_run
from qwen3_sft.errors import DONE, INTERRUPTED, Interrupted, exit_code_of
from qwen3_sft.export.card import model_card
from qwen3_sft.export.export import export_model
from qwen3_sft.export.upload import upload_model
from qwen3_sft.hardware import device_info
from qwen3_sft.model.attention_trial import switch_on
from qwen3_sft.model.base import checked_base
from qwen3_sft.model.fingerprint import model_fingerprint
from qwen3_sft.model.loading import load_model, resolve_model
from qwen3_sft.model.patches import FP8_PATCHES
from qwen3_sft.options.batch import rows_per_step
from qwen3_sft.options.changes import comparable
from qwen3_sft.options.draft import TrainDraft
from qwen3_sft.options.recipe import Options, parse_options
from qwen3_sft.options.train_args import TrainArguments
from qwen3_sft.plan.advice import MemorySettings
from qwen3_sft.records.folder_lock import claimed
from qwen3_sft.records.run_folder import RunFolder, versions
from qwen3_sft.start_checks import check_place, check_start
from qwen3_sft.training.arguments import final_arguments
from qwen3_sft.training.callbacks import TellStep
from qwen3_sft.training.determinism import make_deterministic
from qwen3_sft.training.out_of_memory import naming
from qwen3_sft.training.summary import describe_summary, write_summary
from qwen3_sft.training.trainer import SftTrainer

logger = logging.getLogger(__name__)


def run_command(argv: list[str]) -> int:
    """Run a command line; mistakes become a message and an exit code, not a traceback."""
    return exit_code_of(lambda: _run_command(argv), logger.error, also=(monkey_patch.PatchError,))


def _run_command(argv: list[str]) -> int:
    options = parse_options(argv)
    if options.train.dry_run:
        for line in dry_run(options):
            logger.info("%s", line)
        return DONE
    with PeerWatch() as peers:
        return run(options, peers)


def run(options: Options, peers: PeerWatch) -> int:
    """Train one recipe into its run folder, or say that this has been done; return the exit code.

    That is 75 where a signal has interrupted training, which is then saved.
    """
    folder = RunFolder(options.output_dir)
    if summary := check_start(folder, options):
        logger.info("%s", describe_summary(folder, summary))
        return DONE
    check_place(options)
    check_options(options, Machine.here(options.train))
    if options.train.deterministic:
        make_deterministic()
    with claimed(folder):
        return _run_in(folder, options, peers)


def _run_in(folder: RunFolder, options: Options, peers: PeerWatch) -> int:
    name, data = resolve_demo(options.model.model_name_or_path, options.data, folder.demo)
    # Before TrainingArguments exist: then even a model on the meta device would be sharded.
    checked = checked_base(resolve_model(name, options.model.model_revision))
    base = checked.folder
    decisions = decide(options, checked.model, Machine.here(options.train))
    check_model(decisions, checked.model)
    if os.environ.get("RANK", "0") == "0":  # the others write no more than it
        check_disk(decisions, checked.model)
    _say(decisions)
    # Outside any process group: this may take hours.
    tokens = prepare_tokens(data, checked.tokenizer, options.train.seed)

    _join(options.train, peers)
    # GPUs may differ, what layers do must not.
    decisions = with_plan(decisions, on_first_rank(lambda: decisions.plan))
    args = final_arguments(decisions.options, decisions.engine)
    decisions = _with_checkpoint(decisions, folder, args, base, tokens)
    model, patches = _load(base, decisions, args)
    trainer = build_trainer(decisions, args, model, tokens, folder)
    trainer.add_callback(TellStep(peers))
    if trainer.is_world_process_zero():
        folder.reopen()
        _write_records(folder, decisions, trainer, patches)
        tokens.write_reports(folder.write_json)
    is_whole = _train(trainer, decisions.checkpoint)
    if is_whole and args.stop_after_steps is None:
        with patches.paused(*FP8_PATCHES):  # whoever loads the model will compute without
            _finish(trainer, options, decisions.options, base, folder, tokens.turn_ends)
    is_first = trainer.is_world_process_zero()
    peers.leave()
    leave_process_group()
    if is_whole and is_first and options.train.push_to_hub and args.stop_after_steps is None:
        upload_model(options.train, folder.model)
    return DONE if is_whole else INTERRUPTED


def _say(decisions: Decisions) -> None:
    """Say what was decided; a plan that does not fit is a warning, since only the GPU knows."""
    for line in decisions.lines():
        logger.info("%s", line)
    if decisions.advice_line and os.environ.get("RANK", "0") == "0":
        logger.warning("this is likely to run out of memory; %s", decisions.advice_line)


def _join(train: TrainDraft, peers: PeerWatch) -> None:
    """Meet the other processes and begin to watch them, if there are any."""
    backend = "gloo" if train.use_cpu else train.ddp_backend
    if store := join_process_group(train.dist_timeout_s, backend):
        peers.start(store, dist.get_rank(), dist.get_world_size())


def _with_checkpoint(
    decisions: Decisions, folder: RunFolder, args: TrainArguments, base: Path, tokens: Tokens
) -> Decisions:
    """Decide what the run goes on from, now that its data is known and its processes have met."""
    identity = run_identity(
        decisions.options, tokens.train.report["fingerprints"],
        on_first_rank(lambda: model_fingerprint(base)),
        str(decisions.weights).removeprefix("torch."), rows_per_step(args),
    )  # fmt: skip
    checkpoint = agree_on_checkpoint(folder, args, decisions.engine, identity)
    return replace(decisions, identity=identity, checkpoint=checkpoint)


def _load(
    base: Path, decisions: Decisions, args: TrainArguments
) -> tuple[Any, monkey_patch.AppliedPatches]:
    """Read the weights and patch the model."""
    options, engine = decisions.options, decisions.engine
    settings = MemorySettings.of(args, engine, options.data.max_length)
    with naming("loading the weights", settings):
        model: Any = load_model(
            base, options.model, args.device, decisions.weights, decisions.attention_name,
            engine=engine, compute=decisions.compute,
        )  # fmt: skip
        switch_on(decisions.attention_name)
        patches = monkey_patch.apply_patches(model, decisions.patches)
        if engine.layout == "whole":
            model.to(args.device)
    return model, patches


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


def _write_records(
    folder: RunFolder, decisions: Decisions, trainer: SftTrainer,
    patches: monkey_patch.AppliedPatches,
) -> None:  # fmt: skip
    fp8 = decisions.selection
    folder.write_config(decisions.options.resolved())
    folder.write_json(
        "environment.json",
        {
            "versions": versions(),
            "device": asdict(device_info()),
            "engine": asdict(decisions.engine),
            "world_size": trainer.args.world_size,
            "weights_dtype": str(trainer.model.dtype),
            "autocast_dtype": "bfloat16" if trainer.args.bf16 else None,
            "attn_implementation": decisions.attention_name,
            "patches": patches.counts,
            "fp8": None if fp8 is None else asdict(fp8),
        },
    )


def _finish(
    trainer: SftTrainer, asked: Options, used: Options, base: Path, folder: RunFolder,
    turn_ends: list[str],
) -> None:  # fmt: skip
    """Export the model, say what happened, and mark the run as finished."""
    dtype = used.model.export_dtype
    export_model(
        trainer.accelerator.unwrap_model(trainer.model), base, folder.model,
        None if dtype == "auto" else getattr(torch, dtype), turn_ends=turn_ends,
        layout=used.model.export_layout, source=folder.path,
        card=model_card(used, versions()),
    )  # fmt: skip
    if trainer.is_world_process_zero():
        compared = {"asked": comparable(asked.values()), "used": comparable(used.values())}
        logger.info("%s", write_summary(trainer, folder, compared))
    trainer.accelerator.wait_for_everyone()

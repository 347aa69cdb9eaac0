"""Put a trainer together from model, tokens and options."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback

from monkey_patch.router_aux_loss import router_statistics
from qwen3_sft.checkpoints.folders import step_of
from qwen3_sft.data.token_store import TokenDataset
from qwen3_sft.data.tokens import Tokens
from qwen3_sft.decisions import Decisions
from qwen3_sft.distributed.engine import Engine
from qwen3_sft.errors import DataError, UsageError
from qwen3_sft.hardware import device_info
from qwen3_sft.model.activation_checkpointing import SeenOperators, enable_checkpointing
from qwen3_sft.model.layer_compile import compile_layers
from qwen3_sft.options.batch import rows_per_step
from qwen3_sft.options.data_args import DataArguments
from qwen3_sft.options.train_args import TrainArguments
from qwen3_sft.packing.collator import PackedCollator
from qwen3_sft.packing.passes import Passes
from qwen3_sft.packing.rows import PackedDataset
from qwen3_sft.plan.plan import RunPlan
from qwen3_sft.records.run_folder import RunFolder, versions
from qwen3_sft.records.step_lines import StepLines
from qwen3_sft.training.callbacks import (
    EarlyStopping,
    EpochCallback,
    KeptCheck,
    StartCallback,
    StopAfter,
)
from qwen3_sft.training.completions import CompletionCallback, pick_prompts
from qwen3_sft.training.metrics import Metrics
from qwen3_sft.training.plan_check import PlanCheck
from qwen3_sft.training.reporters import guard_reporters
from qwen3_sft.training.trainer import SftTrainer

logger = logging.getLogger(__name__)


def build_trainer(
    decisions: Decisions,
    args: TrainArguments,
    model: PreTrainedModel,
    tokens: Tokens,
    folder: RunFolder,
) -> SftTrainer:
    """Return the trainer of one run, its datasets packed for this world size.

    Args:
        decisions: on engine, layers, data options and checkpoint.
        args: joins the process group, so the data is prepared before it exists.
        model: patched, on its device.
        tokens: what to train and to evaluate on.
        folder: where metrics and samples go.

    Raises:
        UsageError: accelerate did not switch the engine on.
    """
    data, plan, engine = decisions.options.data, decisions.plan, decisions.engine
    train_rows, eval_rows = _pack(args, tokens, data)
    statistics = router_statistics(model)
    if args.router_aux_loss_coef is not None:
        statistics.coefficient = args.router_aux_loss_coef
    args.disable_tqdm = True  # our own line per step says more
    args.dataloader_pin_memory = args.dataloader_pin_memory and args.device.type == "cuda"
    first = args.process_index == 0
    resume_step = None if decisions.checkpoint is None else step_of(decisions.checkpoint)
    metrics = Metrics(
        args, model.config, router_statistics=statistics, peak_flops=_peak_flops(args, model),
        file=StepLines(folder.metrics, resume_step) if first else None,
    )  # fmt: skip
    trainer = SftTrainer(
        model=model,
        args=args,
        processing_class=tokens.tokenizer,
        data_collator=PackedCollator(data.max_length, tokens.tokenizer.pad_token_id),
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        callbacks=_callbacks(args, train_rows, tokens, data, folder, resume_step, plan, metrics),
        engine=engine,
        metrics=metrics,
        run_facts={
            "identity": decisions.identity,
            "versions": versions(),
            "turn_ends": tokens.turn_ends,
        },
    )
    _check_engine(trainer, engine)
    trainer.add_callback(KeptCheck(_shape_layers(trainer, plan), decisions.attention_name))
    trainer.remove_callback(PrinterCallback)
    guard_reporters(trainer.callback_handler.callbacks)
    return trainer


def _shape_layers(trainer: SftTrainer, plan: RunPlan) -> SeenOperators:
    """Set what accelerate and the Trainer would set otherwise; return what the layers will run."""
    args = trainer.args
    if plan.engine.kind == "fsdp" and args.bf16:
        set_fsdp_precision(trainer.accelerator.state.fsdp_plugin)
    seen = enable_checkpointing(trainer.model, plan.layers, offload=args.activation_offload)
    if args.compiles_layers:
        compile_layers(trainer.model)
    return seen


def _pack(
    args: TrainArguments, tokens: Tokens, data: DataArguments
) -> tuple[PackedDataset, dict[str, PackedDataset] | None]:
    """Pack for this world size and say in words what one step is."""
    per_step = rows_per_step(args)
    train_rows = PackedDataset(
        tokens.train, data.max_length, packing=data.packing, seed=args.seed,
        rows_multiple_of=per_step, passes=_passes(tokens.train, args.seed),
    )  # fmt: skip
    eval_rows = {
        name: PackedDataset(
            view, data.max_length, packing=data.packing, seed=args.seed,
            rows_multiple_of=args.world_size * args.per_device_eval_batch_size,
        )
        for name, view in ({} if tokens.eval is None else tokens.eval.by_source()).items()
    }  # fmt: skip
    logger.info(
        "data: %d samples in %d rows of %d tokens (%.2f%% full); one step = %d processes x %d "
        "rows x %d accumulated = %s tokens", len(tokens.train), len(train_rows), data.max_length,
        100 * train_rows.fill, args.world_size, args.per_device_train_batch_size,
        args.gradient_accumulation_steps, f"{per_step * data.max_length:,}",
    )  # fmt: skip
    return train_rows, eval_rows or None


def _passes(tokens: TokenDataset, seed: int) -> Passes | None:
    """Return how often an epoch takes each sample; None if it is once.

    Raises:
        DataError: so small a share of a source is asked for that it is none of its samples.
    """
    repeats = [source["repeat"] for source in tokens.report["sources"]]
    if set(repeats) == {1.0}:
        return None
    source_of = tokens.source_of
    for number, repeat in enumerate(repeats):
        samples = int((source_of == number).sum())
        if samples and round(samples * repeat) == 0:
            source = tokens.report["sources"][number]
            raise DataError(
                f"{source['path']}: repeat {repeat:g} of {samples} samples takes none; set "
                f"{1 / samples:.2g} or more"
            )
    return Passes(tokens.lengths, source_of, repeats, seed)


def _callbacks(
    args: TrainArguments,
    train_rows: PackedDataset,
    tokens: Tokens,
    data: DataArguments,
    folder: RunFolder,
    resume_step: int | None,
    plan: RunPlan,
    metrics: Metrics,
) -> list[TrainerCallback]:
    callbacks: list[TrainerCallback] = [
        EpochCallback(train_rows),
        StartCallback(train_rows, tokens.tokenizer.pad_token_id, plan.engine.layout),
        PlanCheck(
            plan.components(),
            None if plan.expected is None else plan.expected.tokens_per_second,
            partial(folder.write_json, "plan_check.json"),
            metrics,
            plan.engine.layout,
        ),
    ]  # fmt: skip
    if args.stop_after_steps is not None:
        callbacks.append(StopAfter(args.stop_after_steps))
    if args.early_stopping_patience is not None:
        callbacks.append(EarlyStopping())
    first = args.process_index == 0
    if tokens.eval is not None and args.num_samples and (first or plan.engine.shards_weights):
        prompts = pick_prompts(tokens.eval, tokens.tokenizer, args.num_samples, data.max_length)
        callbacks.append(
            CompletionCallback(
                StepLines(folder.samples, resume_step) if first else None, prompts,
                tokens.tokenizer, args.sample_max_new_tokens, resume_step, metrics,
                tokens.turn_ends,
            )
        )  # fmt: skip
    return callbacks


def _check_engine(trainer: SftTrainer, engine: Engine) -> None:
    """Raise where accelerate fell back to something else in silence, as it does on a CPU.

    Raises:
        UsageError: naming what is on instead.
    """
    is_on = (trainer.is_deepspeed_enabled, trainer.is_fsdp_enabled)
    if is_on != (engine.layout == "zero", engine.kind == "fsdp"):
        raise UsageError(
            f"the launch file asks for {engine}, but accelerate switched on "
            f"{trainer.accelerator.distributed_type.value}; FSDP needs GPUs, and DeepSpeed must be "
            "launched without --use_cpu"
        )


def set_fsdp_precision(plugin: Any) -> None:
    """Have accelerate's FSDP compute in bfloat16, but sum gradients and return the loss in float32.

    Accelerate's policy for bf16 reduces in bfloat16 and casts what the model returns to it, the
    loss included (`FullyShardedDataParallelPlugin.set_mixed_precision`, accelerate 1.15).

    Remove when accelerate sums FSDP's gradients in float32 and leaves outputs uncast: this function
    """
    plugin.mixed_precision_policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32
    )


def _peak_flops(args: TrainArguments, model: PreTrainedModel) -> float | None:
    is_bf16 = args.bf16 or model.dtype == torch.bfloat16
    return device_info().peak_flops["bf16" if is_bf16 else "fp32"]

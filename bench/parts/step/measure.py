"""Run one row: build, train the warm-up and the counted steps, profile more, free the memory."""

from __future__ import annotations

import gc
import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from parts.step.breakdown import breakdown
from parts.step.model import build_model, liger_kernels, model_config, wants_liger
from parts.step.options import StepOptions
from parts.step.ranges import ALL, Ranges
from parts.step.rows import RandomDocuments, collator_of, document_lengths, layout_of, length_facts
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import PrinterCallback, TrainerCallback

import monkey_patch
from qwen3_sft.distributed.engine import Engine
from qwen3_sft.hardware import device_info, memory_stats
from qwen3_sft.options.model_args import ModelArguments
from qwen3_sft.options.recipe import parse_options
from qwen3_sft.options.train_args import TrainArguments
from qwen3_sft.packing.rows import PackedDataset
from qwen3_sft.records.step_lines import StepLines
from qwen3_sft.training.arguments import completed, final_arguments
from qwen3_sft.training.loss import loss_sums
from qwen3_sft.training.metrics import Metrics
from qwen3_sft.training.trainer import SftTrainer

PROFILED = 3
_ERRORS = (RuntimeError, ValueError, TypeError, AttributeError, ImportError, OSError)
# Keys of metrics.jsonl whose values over the counted steps are reported.
_METRICS = (
    "step_time_s", "tokens", "label_tokens", "tokens_per_second_per_gpu", "model_tflops_per_gpu",
    "mfu", "padding_fraction", "expert_load_max_over_mean",
)  # fmt: skip


def measure(options: StepOptions) -> dict[str, Any]:
    """Return the row's options, what was resolved, and its figures.

    Raises:
        UsageError: options that a run would refuse too.
        ModelError: an attention or kernel that cannot run here.
    """
    free_memory()
    with tempfile.TemporaryDirectory() as folder:
        args, model = resolve(options, Path(folder))
        with liger_kernels(wants_liger(model, args.device)):
            result = _train(options, args, model, Path(folder))
    free_memory()
    return result


def attempt(options: StepOptions) -> dict[str, Any]:
    """Return the row, or its options and the error that it ended with: a result too."""
    try:
        return measure(options)
    except _ERRORS as error:
        text = str(error).strip().splitlines() or [""]
        return {"options": asdict(options), "error": f"{type(error).__name__}: {text[0]}"}


def _train(
    options: StepOptions, args: TrainArguments, model_args: ModelArguments, folder: Path
) -> dict[str, Any]:
    model, facts = build_model(options, args, model_args)
    lengths = document_lengths(options, options.batch * args.max_steps)
    attention = facts["attn_implementation"]
    trainer = SftTrainer(
        model=model,
        args=args,
        data_collator=collator_of(options, attention),
        train_dataset=PackedDataset(
            RandomDocuments(lengths, model.config.vocab_size), options.max_length,
            packing=options.packing, rows_multiple_of=options.batch,
        ),
        engine=Engine("single"),
        metrics=Metrics(
            args, model.config,
            router_statistics=(
                monkey_patch.router_statistics(model) if options.router_aux_loss else None
            ),
            peak_flops=device_info().peak_flops["fp32" if options.dtype == "float32" else "bf16"],
            file=StepLines(folder / "metrics.jsonl"),
        ),
        run_facts={},
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    watch = _Watch(trainer, options)
    trainer.add_callback(watch)
    trainer.train()
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    counted = records[options.warm_up : options.warm_up + options.steps]
    result = {
        "options": asdict(options),
        "resolved": {**facts, "layout": layout_of(attention), "optim_args": args.optim_args},
        "lengths": length_facts(lengths),
        **figures(counted),
        **watch.memory,
        "loss_first": counted[0]["loss"],
        "loss_last": counted[-1]["loss"],
    }
    if not options.router_aux_loss:
        result["expert_load_max_over_mean"] = {"median": _expert_load(trainer)}
    if options.breakdown:
        tokens = sum(record["tokens"] for record in records[-PROFILED:])
        result["breakdown"] = breakdown(watch.events).per_token(tokens)
    return result


def resolve(options: StepOptions, folder: Path) -> tuple[TrainArguments, ModelArguments]:
    """Return the arguments that a run makes of these options, refusals included."""
    last = options.warm_up + options.steps + (PROFILED if options.breakdown else 0)
    policies = options.policies(model_config(options).num_hidden_layers)
    words = {
        "model_name_or_path": options.model, "dataset": "demo", "output_dir": folder,
        "max_length": options.max_length, "per_device_train_batch_size": options.batch,
        "dtype": "bfloat16" if options.dtype == "bfloat16" else "float32",
        "bf16": options.dtype == "autocast", "use_cpu": not torch.cuda.is_available(),
        "optim": options.optim, "optim_args": options.optim_args,
        "optimizer_in_backward": options.optimizer_in_backward, "clip": options.clip,
        "activation_checkpointing": next(p for p in ("selective", "full", "none") if p in policies),
        "activation_offload": options.activation_offload, "torch_compile": options.torch_compile,
        "experts_implementation": options.experts_implementation,
        "attn_implementation": options.attn_implementation, "fp8": options.fp8,
        "fp8_scaling": options.fp8_scaling,
        "use_liger": options.use_liger,
        "max_steps": last, "save_strategy": "no", "disable_tqdm": True,
        "memory_warm_up": False,  # it would be the peak of a batch that is not among the counted
    }  # fmt: skip
    argv = [w for k, v in words.items() if v is not None for w in (f"--{k}", str(v))]
    engine = Engine("single")
    parsed = completed(parse_options(argv), engine, 1, has_bf16=False)
    args = final_arguments(parsed, engine)
    args.dataloader_pin_memory = args.dataloader_pin_memory and args.device.type == "cuda"
    return args, parsed.model


def figures(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Sum up the counted steps.

    Returns:
        Each metric's median, least, greatest and mean, and the rates of the middle step: the mean
        work of a step over the median time of one. Steps of unpacked rows differ in their tokens,
        and a median of tokens per second would leave out the full ones.
    """
    result: dict[str, Any] = {name: spread([r[name] for r in records]) for name in _METRICS}
    seconds = result["step_time_s"]["median"]
    tokens = statistics.fmean(r["tokens"] for r in records)
    teraflops = statistics.fmean(r["model_tflops_per_gpu"] * r["step_time_s"] for r in records)
    has_mfu = records[0]["mfu"] is not None
    work = statistics.fmean(r["mfu"] * r["step_time_s"] for r in records) if has_mfu else None
    return {
        "tokens_per_second": tokens / seconds,
        "tflops": teraflops / seconds,
        "mfu_of_device": None if work is None else work / seconds,
        **result,
    }


def spread(values: Sequence[float | None]) -> dict[str, float] | None:
    """Return median, least, greatest and mean; None where nothing was measured."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return {
        "median": statistics.median(known), "min": min(known), "max": max(known),
        "mean": statistics.fmean(known),
    }  # fmt: skip


class _Watch(TrainerCallback):
    """Reads the memory after the last counted step, then profiles the steps that follow.

    Attributes:
        memory: peaks of the row so far, GiB.
        events: of the Chrome trace.
    """

    def __init__(self, trainer: SftTrainer, options: StepOptions) -> None:
        self.trainer = trainer
        self.last = options.warm_up + options.steps
        self.memory: dict[str, float] = {}
        self.events: list[dict[str, Any]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step != self.last:
            return
        self.ranges = Ranges(self.trainer.model, self.trainer.accelerator)
        activities = [ProfilerActivity.CPU]
        if args.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.synchronize()  # kernels of the step before have no launch in the trace
        self.profile = profile(activities=activities)
        self.profile.start()
        self.span = record_function(ALL)
        self.span.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.last:
            memory = memory_stats()
            self.memory = {
                "peak_allocated_gib": memory.peak_allocated_gib,
                "peak_reserved_gib": memory.peak_reserved_gib,
                "allocation_retries": memory.allocation_retries,
            }
        if state.global_step == self.last + PROFILED:
            if args.device.type == "cuda":
                torch.cuda.synchronize()
            self.span.__exit__(None, None, None)
            self.profile.stop()
            self.ranges.close()
            self.events = _trace(self.profile)


def _trace(done: profile) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        done.export_chrome_trace(str(file))
        return json.loads(file.read_text(encoding="utf-8"))["traceEvents"]


def _expert_load(trainer: SftTrainer) -> float:
    """Return the fullest expert's load over the mean in one batch, of the layer where it is worst.

    For rows without our router, which counts in every step; padding is left out as there.
    """
    batch = next(iter(trainer.get_train_dataloader()))
    mask = batch["token_mask"].flatten().to(trainer.args.device)
    worst: list[float] = []

    def count(router: Any, _: Any, output: tuple[torch.Tensor, ...]) -> None:
        load = torch.bincount(output[2][mask].flatten(), minlength=router.num_experts).float()
        worst.append((load.max() / load.mean()).item())

    routers = [m for name, m in trainer.model.named_modules() if name.endswith("mlp.gate")]
    handles = [router.register_forward_hook(count) for router in routers]
    loss_sums(trainer, [batch])
    for handle in handles:
        handle.remove()
    return max(worst)


def free_memory() -> None:
    """Return the memory of the row before to the device, and count peaks anew."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

"""One process of `load.py`: load a checkpoint as a run would, and write down what that took.

The order is that of `qwen3_sft.run`: process group, arguments, weights, patches; for accelerate's
FSDP, which moves the weights last, the trainer and what it prepares before the first step as well.
"""

from __future__ import annotations

import gc
import json
import os
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from parts.load.launch import LAUNCHES, Launch
from parts.load.memory import PeakMemory
from parts.result_file import write
from parts.step.rows import RandomDocuments
from torch.distributed.tensor import DTensor

import monkey_patch
from qwen3_sft.distributed.engine import Engine, detect
from qwen3_sft.distributed.process_group import join_process_group, leave_process_group
from qwen3_sft.logs import set_up_logging
from qwen3_sft.model import loading as model_module
from qwen3_sft.model.attention import choose_attention
from qwen3_sft.model.loading import load_model, weights_dtype
from qwen3_sft.model.patches import choose_patches
from qwen3_sft.options.recipe import Options, parse_options
from qwen3_sft.packing.collator import PackedCollator
from qwen3_sft.packing.rows import PackedDataset
from qwen3_sft.training.arguments import completed, final_arguments
from qwen3_sft.training.metrics import Metrics
from qwen3_sft.training.trainer import SftTrainer

ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Job:
    """An engine to measure.

    Attributes:
        engine: one of `LAUNCHES`.
        is_as_found: without what `qwen3_sft.model.loading` does to spare host memory.
        checkpoint: the folder to load.
        folder: where ranks write what they found.
        port: for them to meet.
    """

    engine: str
    is_as_found: bool
    checkpoint: Path
    folder: Path
    port: int

    @property
    def launch(self) -> Launch:
        """How it is started."""
        return LAUNCHES[self.engine]

    def out(self, rank: int) -> Path:
        """Where a rank writes."""
        name = f"{self.engine.replace(' ', '_')}_{self.is_as_found:d}_{rank}.json"
        return self.folder / name

    def environment(self, rank: int) -> dict[str, str]:
        """What torchrun would tell a rank."""
        count = str(self.launch.processes)
        if count == "1":
            return {}
        return {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.port), "RANK": str(rank),
            "LOCAL_RANK": str(rank), "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count,
        }  # fmt: skip


def measure(job: Job, rank: int) -> dict[str, Any]:
    """Return what this rank needed and what it keeps, in bytes."""
    job.launch.enter()
    argv = job.launch.argv(job.checkpoint, job.out(rank).with_suffix(".run"))
    options = parse_options(argv)
    engine = detect(options.model, options.data)
    options = completed(options, engine, job.launch.processes, has_bf16=False)
    join_process_group(options.train.dist_timeout_s, "gloo")
    args = final_arguments(options, engine)
    _warm_up(engine)
    with PeakMemory() as loading:
        model = _load(options, engine, job.checkpoint, args)
        gc.collect()
    phases = {"loading": loading.growth.as_json()}
    if engine.kind == "fsdp" and not job.is_as_found:
        with PeakMemory(loading.start) as placing:
            model = _place(model, args, engine)
            gc.collect()
        phases["placing"] = placing.growth.as_json()
    leave_process_group()
    return {
        "rank": args.process_index,
        "engine": str(engine),
        "weights_dtype": str(model.dtype),
        # As found it is not placed, for the time that takes: every rank has all.
        "kept": kept_bytes(model),
        "phases": phases,
    }


def _load(options: Options, engine: Engine, checkpoint: Path, args: Any) -> Any:
    compute = weights_dtype(options.model)
    weights = weights_dtype(options.model, engine, compute)
    attention, _ = choose_attention(options.model.attn_implementation, args.device, compute)
    model = load_model(
        checkpoint, options.model, args.device, weights, attention, engine=engine, compute=compute
    )
    monkey_patch.apply_patches(model, choose_patches(options.model, attention))
    if engine.layout == "whole":
        model.to(args.device)
    return model


def _place(model: Any, args: Any, engine: Engine) -> Any:
    """Have the trainer shard the model, as it does before the first step."""
    documents = RandomDocuments(np.full(16, 64), model.config.vocab_size)
    rows = PackedDataset(documents, 256, rows_multiple_of=args.world_size)
    trainer = SftTrainer(
        model=model, args=args, data_collator=PackedCollator(256, 0), train_dataset=rows,
        engine=engine, metrics=Metrics(args, model.config), run_facts={},
    )  # fmt: skip
    trainer._prepare_for_training(1, None, None)
    return trainer.model


def _warm_up(engine: Engine) -> None:
    """Import and connect first what is no part of loading."""
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1))
    if engine.layout == "zero":
        import deepspeed  # noqa: F401


def kept_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of weights that this process holds, whatever the engine calls them."""
    return sum(t.numel() * t.element_size() for t in map(_local, model.parameters()))


def _local(parameter: Any) -> torch.Tensor:
    if isinstance(parameter, DTensor):
        return parameter.to_local()
    return getattr(parameter, "ds_tensor", parameter)  # DeepSpeed's name for the shard


def _as_found() -> None:
    """Leave out what `qwen3_sft.model.loading` does to spare host memory."""
    model_module.blocks_given_back = nullcontext  # type: ignore[assignment]
    model_module.is_fsdp_enabled = lambda: False  # type: ignore[assignment]


def work(job: Job, rank: int) -> None:
    """Be one rank of a job: measure it and write what was found; called in a process of its own."""
    with job.out(rank).with_suffix(".log").open("wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ |= job.environment(rank)
    os.chdir(ROOT)  # launch files name others from there
    set_up_logging()
    if job.is_as_found:
        _as_found()
    write(job.out(rank), json.dumps(measure(job, rank)) + "\n")

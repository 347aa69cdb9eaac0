"""What to set when memory is short: only what this run can still change, the least costly first.

Which options help depends on what was being done: activations are not there yet when the states of
the optimizer are made, and weights that do not fit leave nothing to compute again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from qwen3_sft.distributed.engine import Engine, Kind

Stage = Literal[
    "loading the weights",
    "preparation, start checks or samples",
    "gradients of all weights",
    "states of the optimizer",
    "update of the optimizer",
    "forward and backward of a micro-batch",
    "evaluation",
]


@dataclass(frozen=True)
class MemorySettings:
    """The options of a run that decide its memory.

    Attributes:
        kind: of the engine.
        world_size: processes, one per GPU.
        shards: processes that share one copy of the weights.
        checkpointing: value of --activation_checkpointing.
        offload: value of --activation_offload.
        train_rows: per_device_train_batch_size.
        eval_rows: per_device_eval_batch_size.
        accumulation: gradient_accumulation_steps.
        has_global_batch: whether --global_batch_size sets the accumulation.
        max_length: tokens of a row.
        in_backward: value of --optimizer_in_backward.
        optim: value of --optim.
    """

    kind: Kind = "single"
    world_size: int = 1
    shards: int = 1
    checkpointing: str = "none"
    offload: bool = False
    train_rows: int = 1
    eval_rows: int = 1
    accumulation: int = 1
    has_global_batch: bool = False
    max_length: int = 4096
    in_backward: bool = False
    optim: str = "adamw_torch_fused"

    @classmethod
    def of(cls, args: Any, engine: Engine, max_length: int) -> MemorySettings:
        """Read them off a run's `TrainArguments`."""
        return cls(
            kind=engine.kind,
            world_size=args.world_size,
            shards=engine.fsdp_size,
            checkpointing=args.checkpointing,
            offload=args.activation_offload,
            train_rows=args.per_device_train_batch_size,
            eval_rows=args.per_device_eval_batch_size,
            accumulation=args.gradient_accumulation_steps,
            has_global_batch=args.global_batch_size is not None,
            max_length=max_length,
            in_backward=args.optimizer_in_backward,
            optim=args.optim.value,
        )


def advice(run: MemorySettings, stage: Stage) -> list[str]:
    """Return options to set, each with what it does, in the order of what they cost.

    Args:
        run: its settings now.
        stage: what memory ran out in.
    """
    return [line for maker in _MAKERS[stage] for line in maker(run)]


def _recompute(run: MemorySettings) -> Iterator[str]:
    if run.checkpointing == "none":
        yield "--activation_checkpointing selective (computes again what costs little)"
    elif run.checkpointing == "selective":
        yield "--activation_checkpointing full (keeps a layer's input alone)"
    elif run.checkpointing == "auto":
        yield "--activation_checkpointing full (auto computes fewer layers again)"


def _offload(run: MemorySettings) -> Iterator[str]:
    if not run.offload:
        with_it = "" if run.checkpointing != "none" else ", with --activation_checkpointing"
        yield f"--activation_offload true (keeps the layers' inputs in host memory{with_it})"


def _fewer_rows(run: MemorySettings) -> Iterator[str]:
    rows = run.train_rows
    if rows == 1:
        return
    fewer = max(n for n in range(1, rows) if rows % n == 0)
    text = f"--per_device_train_batch_size {fewer}"
    if run.in_backward:
        yield f"{text} (a step then has fewer tokens: it is one micro-batch)"
    elif run.has_global_batch:
        yield f"{text} (--global_batch_size keeps the step as it is)"
    else:
        steps = run.accumulation * rows // fewer
        yield f"{text} with --gradient_accumulation_steps {steps}, which is the same step"


def _fewer_eval_rows(run: MemorySettings) -> Iterator[str]:
    if run.eval_rows > 1:
        yield f"--per_device_eval_batch_size {run.eval_rows // 2} (the result is the same)"


def _in_backward(run: MemorySettings) -> Iterator[str]:
    if run.kind == "single" and not run.in_backward:
        one = " (a step is then one micro-batch)" if run.accumulation > 1 else ""
        yield (
            "--optimizer_in_backward true --optim adamw_torch_8bit --dtype bfloat16 --clip "
            f"per_tensor: 4 bytes per weight in all{one}"
        )


def _smaller_states(run: MemorySettings) -> Iterator[str]:
    if run.kind == "single" and run.in_backward and "8bit" in run.optim:
        yield "--optim adamw_torch_4bit (1 byte of states per weight in place of 2)"
    elif run.kind == "ddp" and not any(word in run.optim for word in ("bit", "adafactor")):
        yield "--optim adamw_torch_8bit (2 bytes of states per weight)"


def _bfloat16(run: MemorySettings) -> Iterator[str]:
    if run.kind == "single":
        yield "--dtype bfloat16 with --optim adamw_torch_8bit, if the weights are in float32"


def _shorter(run: MemorySettings) -> Iterator[str]:
    if run.max_length > 512:
        yield f"--max_length {run.max_length // 2} (longer samples are left out of the data)"


def _more_gpus(run: MemorySettings) -> Iterator[str]:
    if run.kind == "single":
        yield "several GPUs with --fsdp_size -1, which share weights, gradients and states"
    elif run.kind == "ddp":
        yield "--fsdp_size -1 (the GPUs share weights, gradients and states)"
    elif run.kind == "native" and run.shards < run.world_size:
        yield f"--fsdp_size -1 in place of {run.shards} (all GPUs share one copy)"
    elif run.kind == "zero2":
        yield "config/zero3.json, which shards the weights too, or more GPUs"
    else:
        yield "more GPUs"


_UPDATE = (_in_backward, _smaller_states, _more_gpus)
_ACTIVATIONS = (_recompute, _offload, _fewer_rows, _in_backward, _smaller_states, _shorter)
_MAKERS: dict[Stage, tuple[Callable[[MemorySettings], Iterator[str]], ...]] = {
    "loading the weights": (_bfloat16, _more_gpus),
    "preparation, start checks or samples": (*_UPDATE, _shorter),
    "gradients of all weights": _UPDATE,
    "states of the optimizer": _UPDATE,
    "update of the optimizer": _UPDATE,
    "forward and backward of a micro-batch": (*_ACTIVATIONS, _more_gpus),
    "evaluation": (_fewer_eval_rows, _in_backward, _shorter, _more_gpus),
}

"""What to set when memory is short: one list of levers, the least costly first.

A plan that does not fit tries them one after the other (`nearest`); a run whose memory ran out
names those that help where it ran out (`advice`): activations are not there yet when the states of
the optimizer are made, and weights that do not fit leave nothing to compute again. Either way only
what this run can still change is named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from qwen3_sft.distributed.engine import Engine, Kind
from qwen3_sft.errors import UsageError
from qwen3_sft.optimizers.choice import EIGHT_BITS, FOUR_BITS, FUSED, OptimizerChoice
from qwen3_sft.options.recipe import Options
from qwen3_sft.options.train_args import TrainArguments
from qwen3_sft.plan.plan import RunPlan

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
    optim: str = FUSED

    @classmethod
    def of(
        cls, args: TrainArguments, engine: Engine, max_length: int, world_size: int | None = None
    ) -> MemorySettings:
        """Read them off a run's options.

        Args:
            args: drafted or final.
            engine: what spreads the run.
            max_length: tokens of a row.
            world_size: processes; what final arguments say by default.
        """
        choice = OptimizerChoice.of(args)
        return cls(
            kind=engine.kind,
            world_size=args.world_size if world_size is None else world_size,
            shards=engine.fsdp_size,
            # Final arguments hide the word from transformers, which means something else by it.
            checkpointing=args.activation_checkpointing or args.checkpointing,
            offload=args.activation_offload,
            train_rows=args.per_device_train_batch_size,
            eval_rows=args.per_device_eval_batch_size,
            accumulation=args.gradient_accumulation_steps,
            has_global_batch=args.global_batch_size is not None,
            max_length=max_length,
            in_backward=choice.in_backward,
            optim=choice.optim,
        )

    @property
    def optimizer(self) -> OptimizerChoice:
        """What the table of optimizers says of this one."""
        return OptimizerChoice(self.optim, in_backward=self.in_backward)


Change = dict[str, Any]


class Lever(NamedTuple):
    """One thing to set.

    Attributes:
        stages: what it helps with.
        words: the option for this run and what it does, for a person; nothing if it is used up.
        changes: values for a plan to try, the mildest first; none for what a plan cannot try.
        is_kept: whether the levers after it are tried with its change.
    """

    stages: tuple[Stage, ...]
    words: Callable[[MemorySettings], Iterator[str]]
    changes: Callable[[MemorySettings], Iterator[Change]] = lambda run: iter(())
    is_kept: bool = False


def advice(run: MemorySettings, stage: Stage) -> list[str]:
    """Return options to set, each with what it does, in the order of what they cost.

    Args:
        run: its settings now.
        stage: what memory ran out in.
    """
    return [line for lever in LEVERS if stage in lever.stages for line in lever.words(run)]


def nearest(
    options: Options, engine: Engine, processes: int, plan: Callable[[Options], RunPlan]
) -> tuple[str, RunPlan] | None:
    """Return the first change that fits, as options to add, and its plan; None if none does.

    Args:
        options: of the run that does not fit.
        engine: what spreads it.
        processes: in all.
        plan: makes the plan of other options.
    """
    run = MemorySettings.of(options.train, engine, options.data.max_length, processes)
    kept: Change = {}
    for lever in LEVERS:
        for change in (changes := list(lever.changes(run))):
            whole = _one_micro_batch(options, kept | change)
            try:
                changed = plan(options.replaced(**whole))
            except UsageError:  # such as rows that do not divide --global_batch_size
                continue
            if changed.fits:
                return " ".join(f"--{k} {_word(v)}" for k, v in whole.items()), changed
        if lever.is_kept and changes:
            kept |= changes[0]
    return None


def describe_advice(found: tuple[str, RunPlan] | None) -> str:
    """Return the sentence about the nearest setting that fits."""
    if found is None:
        return "no setting of this run fits: use more GPUs, or GPUs with more memory"
    flags, plan = found
    return f"nearest setting that fits ({plan.total_gib:.2f} GiB): {flags}"


def _one_micro_batch(options: Options, change: Change) -> Change:
    """Make a step one micro-batch where the optimizer steps in the backward pass."""
    merged = {**options.train.values(), **change}
    if merged["optimizer_in_backward"] and merged["global_batch_size"] is not None:
        return {**change, "global_batch_size": merged["per_device_train_batch_size"]}
    return change


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _recompute(run: MemorySettings) -> Iterator[str]:
    if run.checkpointing == "none":
        yield "--activation_checkpointing selective (computes again what costs little)"
    elif run.checkpointing == "selective":
        yield "--activation_checkpointing full (keeps a layer's input alone)"
    elif run.checkpointing == "auto":
        yield "--activation_checkpointing full (auto computes fewer layers again)"


def _try_auto(run: MemorySettings) -> Iterator[Change]:
    yield {"activation_checkpointing": "auto"}


def _offload(run: MemorySettings) -> Iterator[str]:
    if not run.offload:
        with_it = "" if run.checkpointing != "none" else ", with --activation_checkpointing"
        yield f"--activation_offload true (keeps the layers' inputs in host memory{with_it})"


def _try_offload(run: MemorySettings) -> Iterator[Change]:
    if not run.offload:
        yield {"activation_offload": True}


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


def _try_fewer_rows(run: MemorySettings) -> Iterator[Change]:
    rows = run.train_rows
    while (rows := rows // 2) >= 1:
        yield {"per_device_train_batch_size": rows}


def _fewer_eval_rows(run: MemorySettings) -> Iterator[str]:
    if run.eval_rows > 1:
        yield f"--per_device_eval_batch_size {run.eval_rows // 2} (the result is the same)"


def _in_backward(run: MemorySettings) -> Iterator[str]:
    if run.kind == "single" and not run.in_backward:
        one = " (a step is then one micro-batch)" if run.accumulation > 1 else ""
        flags = " ".join(f"--{name} {_word(value)}" for name, value in _LOW_BIT.items())
        yield f"{flags}: 4 bytes per weight in all{one}"


def _try_in_backward(run: MemorySettings) -> Iterator[Change]:
    if run.kind == "single" and not run.in_backward:
        change = _LOW_BIT | ({"gradient_accumulation_steps": 1} if run.accumulation > 1 else {})
        yield change
        yield from (change | fewer for fewer in _try_fewer_rows(run))


def _smaller_states(run: MemorySettings) -> Iterator[str]:
    row = run.optimizer.row
    if run.kind == "single" and run.in_backward and run.optim == EIGHT_BITS:
        yield f"--optim {FOUR_BITS} (1 byte of states per weight in place of 2)"
    elif run.kind == "ddp" and row.states == "adamw" and row.shards:
        yield f"--optim {EIGHT_BITS} (2 bytes of states per weight)"


def _bfloat16(run: MemorySettings) -> Iterator[str]:
    if run.kind == "single":
        yield f"--dtype bfloat16 with --optim {EIGHT_BITS}, if the weights are in float32"


def _shorter(run: MemorySettings) -> Iterator[str]:
    if run.max_length > 512:
        yield f"--max_length {run.max_length // 2} (longer samples are left out of the data)"


def _try_shorter(run: MemorySettings) -> Iterator[Change]:
    length = run.max_length
    while (length := length // 2) >= 512:
        yield {"per_device_train_batch_size": 1, "max_length": length}


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


_LOW_BIT: Change = {
    "optimizer_in_backward": True, "optim": EIGHT_BITS, "dtype": "bfloat16", "clip": "per_tensor",
}  # fmt: skip
_LOADING: Stage = "loading the weights"
_PREPARATION: Stage = "preparation, start checks or samples"
_UPDATE: tuple[Stage, ...] = (
    _PREPARATION, "gradients of all weights", "states of the optimizer", "update of the optimizer",
)  # fmt: skip
_LAYERS: Stage = "forward and backward of a micro-batch"
_EVALUATION: Stage = "evaluation"

# Recompute more, move activations away, take fewer rows at once (the same step, in more
# micro-batches), keep smaller states and no gradients, make rows shorter, buy more.
LEVERS = (
    Lever((_LAYERS,), _recompute, _try_auto, is_kept=True),
    Lever((_LAYERS,), _offload, _try_offload),
    Lever((_LAYERS,), _fewer_rows, _try_fewer_rows),
    Lever((_EVALUATION,), _fewer_eval_rows),
    Lever((_LOADING,), _bfloat16),
    Lever((*_UPDATE, _LAYERS, _EVALUATION), _in_backward, _try_in_backward, is_kept=True),
    Lever((*_UPDATE, _LAYERS), _smaller_states),
    Lever((_PREPARATION, _LAYERS, _EVALUATION), _shorter, _try_shorter),
    Lever((_LOADING, *_UPDATE, _LAYERS, _EVALUATION), _more_gpus),
)

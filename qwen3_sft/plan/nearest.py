"""The nearest settings with which a run that does not fit would fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from qwen3_sft.distributed.engine import Engine
from qwen3_sft.errors import UsageError
from qwen3_sft.options.recipe import Options
from qwen3_sft.plan.plan import RunPlan
from qwen3_sft.plan.planner import with_options

_LOW_BIT = {
    "optimizer_in_backward": True, "optim": "adamw_torch_8bit", "dtype": "bfloat16",
    "clip": "per_tensor",
}  # fmt: skip


def nearest(
    options: Options, engine: Engine, plan: Callable[[Options], RunPlan]
) -> tuple[str, RunPlan] | None:
    """Return the first change that fits, as options to add, and its plan; None if none does.

    Tried in the order of what they cost: recompute more, fewer rows at once (the same step, in more
    micro-batches), in one process states of 8 bits and gradients that never exist together, and
    shorter rows.

    Args:
        options: of the run that does not fit.
        engine: what spreads it.
        plan: makes the plan of other options.
    """
    for change in _changes(options, engine):
        try:
            changed = plan(with_options(options, **change))
        except UsageError:  # rows that do not divide --global_batch_size
            continue
        if changed.fits:
            return " ".join(f"--{name} {_word(value)}" for name, value in change.items()), changed
    return None


def describe_advice(advice: tuple[str, RunPlan] | None) -> str:
    """Return the sentence about the nearest setting that fits."""
    if advice is None:
        return "no setting of this run fits: use more GPUs, or GPUs with more memory"
    flags, plan = advice
    return f"nearest setting that fits ({plan.total_gib:.2f} GiB): {flags}"


def _changes(options: Options, engine: Engine) -> Iterator[dict[str, Any]]:
    values = options.train_values
    change: dict[str, Any] = {"activation_checkpointing": "auto"}
    yield from _with_fewer_rows(values, change)
    if engine.kind == "single" and not values["optimizer_in_backward"]:
        change |= _LOW_BIT
        if values["gradient_accumulation_steps"] != 1:
            change["gradient_accumulation_steps"] = 1
        yield from _with_fewer_rows(values, change)
    length = options.data.max_length
    while (length := length // 2) >= 512:
        yield _complete(values, {**change, "per_device_train_batch_size": 1, "max_length": length})


def _with_fewer_rows(values: dict[str, Any], change: dict[str, Any]) -> Iterator[dict[str, Any]]:
    rows = values["per_device_train_batch_size"]
    yield _complete(values, change)
    while (rows := rows // 2) >= 1:
        yield _complete(values, {**change, "per_device_train_batch_size": rows})


def _complete(values: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """Make a step one micro-batch where the optimizer steps in the backward pass."""
    merged = {**values, **change}
    if merged["optimizer_in_backward"] and merged["global_batch_size"] is not None:
        return {**change, "global_batch_size": merged["per_device_train_batch_size"]}
    return change


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)

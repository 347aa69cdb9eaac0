"""Rows, micro-batches and processes: what one optimizer step is made of."""

from __future__ import annotations

from qwen3_sft.errors import UsageError
from qwen3_sft.options.train_args import TrainArguments


def accumulation_steps(train: TrainArguments, world_size: int) -> int:
    """Return the micro-batches of a step, from the rows of a step if those are given.

    Args:
        train: the options, drafted or final.
        world_size: processes.

    Raises:
        UsageError: they do not divide, or both are given.
    """
    rows, given = train.global_batch_size, train.gradient_accumulation_steps
    if rows is None:
        return given
    if given != 1:
        raise UsageError(
            "--global_batch_size and --gradient_accumulation_steps are both set: leave one out"
        )
    at_once = world_size * train.per_device_train_batch_size
    if rows < 1 or rows % at_once:
        fits = max(rows // at_once, 1) * at_once
        raise UsageError(
            f"--global_batch_size {rows} is not a multiple of {at_once} rows ({world_size} "
            f"processes x per_device_train_batch_size {train.per_device_train_batch_size}); "
            f"the nearest are {fits} and {fits + at_once}"
        )
    return rows // at_once


def rows_per_step(args: TrainArguments) -> int:
    """Return the packed rows of one optimizer step over all processes."""
    return args.world_size * args.per_device_train_batch_size * args.gradient_accumulation_steps

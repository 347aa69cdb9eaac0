"""Allocate before training all that it will need, so that a lack of memory shows in a minute.

In the order in which a step finds them: the optimizer's states and the temporaries of its update,
then, with the states there, forward and backward of the fullest micro-batch that can come (two
where gradients are accumulated: the second one finds those of the first), then an evaluation. What
the update and the layers compile is compiled on the way.

Nothing may be left of it but memory that the allocator keeps. Weights stay: gradients of zeros and
a learning rate of 0 add 0 to them, and what rounds stochastically has nothing to round (a zero may
lose its sign). Random states are put back. States are zeroed in place, which is what a fresh
optimizer has; loaded ones could only be put back from a second copy, so a resumed run warms up
before it loads them.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerState

from qwen3_sft.hardware import memory_stats
from qwen3_sft.optimizers.low_bit_step import is_low_bit
from qwen3_sft.plan.advice import Stage
from qwen3_sft.training.loss import loss_sums

logger = logging.getLogger(__name__)

# Optimizers whose fresh state is all zeros; torchao's low-bit ones are known by `is_low_bit`.
_BEGIN_WITH_ZEROS = {
    ("torch.optim.adam", "Adam"),
    ("torch.optim.adamw", "AdamW"),
    ("torch.optim._adafactor", "Adafactor"),
    ("transformers.optimization", "Adafactor"),
    ("qwen3_sft.optimizers.adafactor", "SlicedAdafactor"),
}


class MemoryWarmUp(TrainerCallback):
    """Exercises memory once, before the first step: --memory_warm_up, on a GPU by default.

    Attributes:
        is_running: whether it is at it.
    """

    def __init__(self, trainer: Any) -> None:
        """Remember whose memory it is.

        Args:
            trainer: an `SftTrainer`.
        """
        self.trainer = trainer
        self.is_running = False
        wanted = trainer.args.memory_warm_up
        self._is_due = trainer.args.device.type == "cuda" if wanted is None else wanted

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Exercise unless `before_loading` has.

        Raises:
            GpuMemoryError: the run would not fit.
        """
        self._run()

    def before_loading(self) -> None:
        """Exercise, then leave the optimizer empty for the states that are about to be loaded.

        Raises:
            GpuMemoryError: the run would not fit.
        """
        if self._run() and self.trainer.engine.layout != "zero":
            # Both at once would be twice the memory; the allocator keeps these blocks for them.
            self.trainer.torch_optimizer.state.clear()

    def _run(self) -> bool:
        if not self._is_due:
            return False
        self._is_due, self.is_running = False, True
        exercise_memory(self.trainer)
        self.is_running = False
        return True


def exercise_memory(trainer: Any) -> None:
    """Allocate once all that training will, and leave everything as it is.

    Collective: where there are several processes, all of them have to call it.

    Args:
        trainer: an `SftTrainer` whose model and optimizer are prepared, before its first step.

    Raises:
        GpuMemoryError: naming what did not fit.
    """
    if trainer.engine.layout == "zero":
        logger.info("memory warm-up: left out, DeepSpeed has its states and steps in its backward")
        return
    began, peak = time.perf_counter(), _Peak()
    optimizer, fused = trainer.torch_optimizer, trainer.backward_optimizer
    can_step = _begins_with_zeros(optimizer) and not optimizer.state
    if fused is not None and not can_step:  # its hooks would change them
        logger.info("memory warm-up: left out, the optimizer has states already")
        return
    rehearsal = nullcontext() if fused is None else fused.rehearsal()
    counted = trainer.current_flos  # all else is counted anew from the first step on
    with _same_random_numbers(), _learning_rate_zero(optimizer):
        with rehearsal:
            if can_step:
                _exercise_optimizer(trainer, optimizer)
                peak.after("update of the optimizer")
            _exercise_micro_batches(trainer)
            peak.after("forward and backward of a micro-batch")
            if trainer.args.do_eval and trainer.eval_dataset is not None:
                _exercise_evaluation(trainer)
                peak.after("evaluation")
        if can_step:
            zero_states(optimizer)
    trainer.current_flos = counted
    if trainer.metrics.router_statistics is not None:
        trainer.metrics.router_statistics.drain()
    without = "" if can_step else f", without the update of {type(optimizer).__name__}"
    logger.info("memory warm-up: %s; %.1f s%s", peak, time.perf_counter() - began, without)


def zero_states(optimizer: torch.optim.Optimizer) -> None:
    """Make an optimizer's states in place those that it begins with.

    Args:
        optimizer: one whose states begin as zeros.
    """
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, Tensor):
                _zero(value)
            else:
                state[key] = type(value)(0)


class _Peak:
    """The highest memory so far and the stage that reached it."""

    def __init__(self) -> None:
        self.stage = "start-up"
        self.allocated_gib = memory_stats().peak_allocated_gib

    def after(self, stage: Stage) -> None:
        peak = memory_stats().peak_allocated_gib
        if peak > self.allocated_gib:
            self.stage, self.allocated_gib = stage, peak

    def __str__(self) -> str:
        memory = memory_stats()
        held = f"peak {memory.peak_allocated_gib:.2f} GiB resident"
        if torch.cuda.is_available():
            held = (
                f"peak {memory.peak_allocated_gib:.2f} GiB allocated, "
                f"{memory.peak_reserved_gib:.2f} GiB reserved"
            )
        return f"{held}, of {memory.total_gib:.2f} GiB; highest in {self.stage}"


def _exercise_optimizer(trainer: Any, optimizer: torch.optim.Optimizer) -> None:
    if trainer.backward_optimizer is not None:
        with trainer.memory_guard.naming("states of the optimizer"):
            trainer.backward_optimizer.update_all()
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def stage() -> Stage:
        has_all = all(optimizer.state.get(p) for p in parameters)
        return "update of the optimizer" if has_all else "states of the optimizer"

    with trainer.memory_guard.naming("gradients of all weights"):
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
    with trainer.memory_guard.naming(stage):
        optimizer.step()
    for parameter in parameters:
        parameter.grad = None


def _exercise_micro_batches(trainer: Any) -> None:
    args, was_training = trainer.args, trainer.model.training
    count = min(2, args.gradient_accumulation_steps)
    for number in range(1, count + 1):
        batch = _full_batch(trainer, args.per_device_train_batch_size)
        label_tokens = torch.tensor(batch["stats"].label_tokens, device=args.device)
        with _gradients_of(trainer, is_last=number == count):
            trainer.training_step(trainer.model_wrapped, batch, label_tokens)
    trainer.model.zero_grad(set_to_none=True)
    trainer.model.train(was_training)


def _exercise_evaluation(trainer: Any) -> None:
    was_training = trainer.model.training
    with trainer.memory_guard.naming("evaluation"):
        loss_sums(trainer, [_full_batch(trainer, trainer.args.per_device_eval_batch_size)])
    trainer.model.train(was_training)
    # Without a backward pass FSDP leaves the outermost weights whole, and the model then has other
    # parameters than those that optimizer states are loaded for.
    for module in trainer.model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _gradients_of(trainer: Any, *, is_last: bool) -> AbstractContextManager[None]:
    """Sum gradients over ranks as in a step: after its last micro-batch only.

    The choice is that of `Trainer._run_epoch` (transformers 5.23).
    """
    if is_last:
        return nullcontext()
    if trainer.engine.kind == "native":
        return trainer._defer_fsdp_gradient_reduction()
    return trainer.accelerator.no_sync(model=trainer.model_wrapped)


def _full_batch(trainer: Any, rows: int) -> dict[str, Any]:
    """Return a batch of `rows` rows that are one document each, with a label at every token.

    The text is the data's own, repeated: of random tokens or of one the experts would get another
    load.
    """
    ids = np.concatenate([ids for ids, _ in trainer.train_dataset[0]])
    length = trainer.data_collator.max_length
    document = (np.resize(ids, length), np.ones(length, bool))
    return trainer.data_collator([[document]] * rows)


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Draw inside what is drawn again afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def _learning_rate_zero(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Have updates change nothing; weight decay stays, a compiled update is made for its value."""
    groups = optimizer.param_groups
    rates = [group["lr"] for group in groups]
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = torch.zeros_like(rate) if isinstance(rate, Tensor) else 0.0
    try:
        yield
    finally:
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate


def _begins_with_zeros(optimizer: Any) -> bool:
    kind = (type(optimizer).__module__, type(optimizer).__name__)
    return is_low_bit(optimizer) or kind in _BEGIN_WITH_ZEROS


def _zero(value: Any) -> None:
    """Set a state to zeros in place: a tensor, its shard, or torchao's codes and scales."""
    local: Any = value.to_local() if isinstance(value, DTensor) else value
    for tensor in (local.codes, local.scale) if hasattr(local, "codes") else (local,):
        tensor.zero_()

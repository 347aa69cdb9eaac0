"""Noise of stochastic rounding that follows from seed and step, and so is the same on every rank.

Under DDP each process updates a copy of the weights of its own. What rounds draws from the device's
generator, and generators part as soon as one process draws what another does not (a sample, an
evaluation): the copies would part too, without a word. Drawn from the step, it also repeats after
a resume on any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch


class RoundingNoise:
    """Seeds the generators for the time of an optimizer's step, and puts them back.

    Args:
        optimizer: whose `step()` rounds; within a backward pass there is one process and no step.
        seed: of the run, equal on all ranks.
        step: returns the number of the optimizer step, equal on all ranks.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, seed: int, step: Callable[[], int]):
        self._seed, self._step, self._before = seed, step, ExitStack()
        optimizer.register_step_pre_hook(self._begin)
        optimizer.register_step_post_hook(self._end)

    def _begin(self, optimizer: Any, *_: Any) -> None:
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        devices = sorted({p.get_device() for p in parameters if p.is_cuda})
        self._before.enter_context(torch.random.fork_rng(devices))
        # Both below 2**32, and no wait for the device: generators are seeded on the host.
        torch.manual_seed((self._seed << 31) + self._step())

    def _end(self, *_: Any) -> None:
        self._before.close()

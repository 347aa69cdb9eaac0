"""Plan and reality side by side at step 10, by component, so that a wrong plan is noticed.

The peak is that of the process so far, the memory warm-up's included, which has the fullest
micro-batch. Weights, gradients and optimizer states are counted from the tensors that are there,
so that a difference can be laid to one of them or, if they agree, to what exists for a moment. A
CPU's peak also holds Python, the libraries and the files read, so there only these are compared.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerState

from qwen3_sft.training.metrics import Metrics

logger = logging.getLogger(__name__)

_GIB = 2**30
# What a component may be off by before it is worth a report.
TOLERANCE = 0.05
# Of the plan's components the one that no tensor fills: the context and holes between blocks.
_RESERVE = "reserve"


class PlanCheck(TrainerCallback):
    """Logs and records one comparison, on rank 0 and for its GPU.

    The time is that of the second half of the steps, from drawing a batch to the end of its
    update; loading of data, evaluation and saving are left out.
    """

    def __init__(
        self,
        planned: Mapping[str, int],
        tokens_per_second: float | None,
        write: Callable[[dict[str, Any]], None],
        metrics: Metrics,
        layout: str,
        steps: int = 10,
    ) -> None:
        """Remember the plan.

        Args:
            planned: bytes on this GPU by component; `weights`, `gradients` and `optimizer` are
                compared one by one, `reserve` does not count towards the peak.
            tokens_per_second: planned, per GPU; None if unknown.
            write: stores the record.
            metrics: counts the tokens.
            layout: of the engine.
            steps: which step to look at, counted from the start or the resume.
        """
        self.planned, self.tokens_per_second = dict(planned), tokens_per_second
        self.write, self.steps = write, steps
        self.metrics, self.layout = metrics, layout
        self._first = 0
        self._tokens, self._seconds = 0, 0.0
        self._began: tuple[int, float] | None = None
        self._gradients: int | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Count steps from here."""
        self._first = state.global_step

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Take the time."""
        done = state.global_step - self._first
        if self.steps // 2 <= done < self.steps:
            _wait_for_device()
            self._began = (self.metrics.window.stats.tokens, time.perf_counter())

    def on_pre_optimizer_step(
        self, args: Any, state: TrainerState, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Measure the gradients while they are there; in the backward pass they never all are."""
        is_last = state.global_step - self._first + 1 == self.steps
        if is_last and not args.optimizer_in_backward:
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            self._gradients = sum(map(tensor_bytes, gradients))

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Take the time and, after the last step, compare."""
        if self._began is None:
            return
        _wait_for_device()
        tokens, began = self._began
        self._tokens += self.metrics.window.stats.tokens - tokens
        self._seconds += time.perf_counter() - began
        self._began = None
        if state.global_step - self._first == self.steps and state.is_world_process_zero:
            self._report(state.global_step, args.device, kwargs["model"], kwargs["optimizer"])

    def _report(self, step: int, device: torch.device, model: nn.Module, optimizer: Any) -> None:
        measured = {"weights": weights_bytes(model)}
        if self._gradients is not None:
            measured["gradients"] = self._gradients
        if self.layout != "zero":  # DeepSpeed's states are flat and its own
            measured["optimizer"] = optimizer_bytes(optimizer)
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
        speed = self._tokens / self._seconds
        record = compare(
            self.planned, measured, peak,
            {"planned": self.tokens_per_second, "measured": speed}, step,
        )  # fmt: skip
        logger.info("%s", describe(record))
        try:
            self.write(record)
        except OSError as error:
            logger.warning("cannot write the plan's check (%s); training goes on", error)
        if not record["is_within_tolerance"]:
            logger.warning(
                "the memory plan is off by more than %.0f%%: please report this with the run's "
                "plan_check.json and environment.json", 100 * TOLERANCE,
            )  # fmt: skip


def compare(
    planned: Mapping[str, int],
    measured: Mapping[str, int],
    peak: int | None,
    tokens_per_second: Mapping[str, float | None],
    step: int,
) -> dict[str, Any]:
    """Return the record of one comparison.

    Args:
        planned: bytes by component.
        measured: bytes of those that can be measured.
        peak: most bytes in tensors so far; None on a CPU, where it cannot be told.
        tokens_per_second: `planned` and `measured`, per GPU.
        step: when it was measured.

    Returns:
        `step`; `peak` and every one of `components` and `tokens_per_second` as `planned`,
        `measured` and `difference`, a share of the plan; `is_within_tolerance`, by the peak or,
        without one, by the components.
    """
    total = sum(size for name, size in planned.items() if name != _RESERVE)
    components = {
        name: _pair(planned[name], size) for name, size in measured.items() if name in planned
    }
    whole = _pair(total, peak)
    judged = components.values() if peak is None else [whole]
    off = [pair["difference"] for pair in judged if pair["difference"] is not None]
    return {
        "step": step,
        "peak": whole,
        "components": components,
        "tokens_per_second": _pair(tokens_per_second["planned"], tokens_per_second["measured"]),
        "is_within_tolerance": all(abs(share) <= TOLERANCE for share in off),
    }


def describe(record: Mapping[str, Any]) -> str:
    """Return the line for the log."""
    return f"plan check at step {record['step']}: " + "; ".join(_parts(record))


def _parts(record: Mapping[str, Any]) -> Iterator[str]:
    peak = record["peak"]
    if peak["measured"] is None:
        yield "on a CPU only what lasts is compared"
    else:
        yield f"peak {_in_gib(peak)}"
    yield from (f"{name} {_in_gib(pair)}" for name, pair in record["components"].items())
    speed = record["tokens_per_second"]
    if speed["planned"] is None:
        yield f"{speed['measured']:,.0f} tok/s per GPU, none planned"
    else:
        yield (
            f"{speed['measured']:,.0f} tok/s per GPU, {speed['planned']:,.0f} planned "
            f"({speed['difference']:+.1%})"
        )


def weights_bytes(model: nn.Module) -> int:
    """Return the bytes of parameters and buffers on this device, of a sharded one its shard."""
    return sum(map(tensor_bytes, [*model.parameters(), *model.buffers()]))


def optimizer_bytes(optimizer: Any) -> int:
    """Return the bytes of an optimizer's states that lie beside their weights."""
    return sum(
        tensor_bytes(value)
        for parameter, state in optimizer.state.items()
        for value in state.values()
        if isinstance(value, Tensor) and value.device == parameter.device
    )


def tensor_bytes(tensor: Any) -> int:
    """Return the bytes behind a tensor here: of a DTensor its shard, of torchao's their parts."""
    if isinstance(tensor, DTensor):
        return tensor_bytes(tensor.to_local())
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(tensor_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def _pair(planned: float | None, measured: float | None) -> dict[str, float | None]:
    share = measured / planned - 1 if planned and measured is not None else None
    return {"planned": planned, "measured": measured, "difference": share}


def _in_gib(pair: Mapping[str, Any]) -> str:
    share = "" if pair["difference"] is None else f" ({pair['difference']:+.1%})"
    return f"{pair['measured'] / _GIB:.2f} GiB, {pair['planned'] / _GIB:.2f} planned{share}"


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()

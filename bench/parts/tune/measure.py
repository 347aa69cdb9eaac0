"""One stage under one cut: is it right, and how fast.

The inputs of every stage are what plain torch makes of the stages before it, so that each is
judged, and can be wrong, by itself. Nothing is timed that is wrong.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from parts.ops.case import LIMITS, Case, make_inputs, rms_ratio
from parts.ops.measure import Stopwatch

from monkey_patch.kernels.scatter_moe.plain import PlainStages
from monkey_patch.kernels.scatter_moe.triton.stages import TritonStages
from monkey_patch.kernels.scatter_moe.triton.tiles import Tiles

# Products of `Case.product_flops` in each stage, the largest sums first.
PRODUCTS = {
    "weight_gradient": 3, "up": 2, "input_gradient": 2, "down": 1, "activation_gradient": 1
}  # fmt: skip
_MILLISECONDS = 25.0  # of timing per cut and routing
_REPEATS = (5, 50)


@dataclass
class Timing:
    """One cut of one stage at one number of tokens.

    Attributes:
        stage: one of `PRODUCTS`.
        tokens: T.
        rows: per expert on average, T * K // E.
        cut: how the stage was cut.
        ms: median by routing.
        rms_error: the largest RMS(error) / RMS(reference) by routing.
        problem: why the times are missing; None where they are there.
    """

    stage: str
    tokens: int
    rows: int
    cut: Tiles
    ms: dict[str, float] = field(default_factory=dict)
    rms_error: dict[str, float] = field(default_factory=dict)
    problem: str | None = None

    @property
    def mean_ms(self) -> float:
        """The mean over the routings; infinite where the cut failed."""
        return statistics.mean(self.ms.values()) if self.ms and not self.problem else math.inf

    def as_json(self) -> dict[str, Any]:
        """Return the fields."""
        return asdict(self)


class _OneCut(TritonStages):
    """The stages with one cut instead of the table's."""

    def __init__(self, routing: Any, top_k: int, cut: Tiles) -> None:
        super().__init__(routing, top_k)
        self.cut = cut

    def tiles(self, stage: str, operand: torch.Tensor) -> Tiles:
        """Return the cut."""
        return self.cut


class Workload:
    """The inputs of all stages for one case, and what they have to return.

    Args:
        case: shape, routing and device.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        inputs = make_inputs(case)
        self.x, self.gate_up, self.down, self.index, self.weights, self.grad = (
            tensor.detach() for tensor in inputs
        )
        self.routing = TritonStages.sort_by_expert(self.index, case.experts)
        self.watch = Stopwatch(case.device)
        plain = PlainStages(self.routing, case.top_k)
        # Each stage finds its inputs among the results of those before it.
        self.expected: dict[str, tuple[torch.Tensor, ...]] = {}
        for stage in ("up", "down", "activation_gradient", "input_gradient", "weight_gradient"):
            self.expected[stage] = self.run(stage, plain)

    def run(self, stage: str, stages: Any) -> tuple[torch.Tensor, ...]:
        """Return all results of one stage."""
        hidden, act = self.expected.get("up", (None, None))
        d_hidden, scaled_act = self.expected.get("activation_gradient", (None, None))[:2]
        match stage:
            case "up":
                return stages.up(self.x, self.gate_up, hidden=True, act=True)
            case "down":
                return (stages.down(act, self.down),)
            case "activation_gradient":
                return stages.activation_gradient(
                    self.grad, self.down, hidden, self.weights, act=True, overwrite=False
                )
            case "input_gradient":
                return (stages.input_gradient(d_hidden, self.gate_up),)
            case "weight_gradient":
                found = torch.empty_like(self.gate_up), torch.empty_like(self.down)
                stages.gate_up_gradient(d_hidden, self.x, found[0], accumulate=False)
                stages.down_gradient(self.grad, scaled_act, found[1], accumulate=False)
                return found
        raise ValueError(f"unknown stage {stage!r}")

    def measure(self, timing: Timing) -> None:
        """Fill in error and time for this routing, or the problem."""
        stages = _OneCut(self.routing, self.case.top_k, timing.cut)
        self._poison(timing.stage)
        results = zip(self.run(timing.stage, stages), self.expected[timing.stage], strict=True)
        errors = (rms_ratio(found, truth) for found, truth in results)
        error = max(errors, key=lambda ratio: (math.isnan(ratio), ratio))
        timing.rms_error[self.case.routing] = error
        limit = LIMITS[self.case.torch_dtype]
        if not error <= limit:
            timing.problem = f"wrong on {self.case.routing} rows: RMS error {error:.1e} > {limit}"
            return
        timing.ms[self.case.routing] = statistics.median(self._times(timing.stage, stages))

    def _times(self, stage: str, stages: TritonStages) -> list[float]:
        for _ in range(2):
            self.watch.time(lambda: self.run(stage, stages))
        fewest, most = _REPEATS
        count = min(most, max(fewest, int(_MILLISECONDS / self.watch.read()[-1])))
        for _ in range(count):
            self.watch.time(lambda: self.run(stage, stages))
        return self.watch.read()

    def _poison(self, stage: str) -> None:
        """Leave NaN in the memory that the stage's results get."""
        blocks = [torch.full_like(tensor, math.nan) for tensor in self.expected[stage]]
        del blocks

"""Whether a run fits its GPUs and how fast it should go, before anything is loaded.

Three counts are put together: what stays in memory (weights.py), what a micro-batch leaves
there until its backward pass (activations.py), and the time that products and memory traffic
take (step_time.py). planner.py makes one from the options of a run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from qwen3_sft.distributed.engine import Engine
from qwen3_sft.errors import DoesNotFitError, UsageError
from qwen3_sft.hardware import device_info, device_names, find_device
from qwen3_sft.model.activation_checkpointing import Policy
from qwen3_sft.plan.activations import ActivationPlan
from qwen3_sft.plan.step_time import StepTime
from qwen3_sft.plan.weights import GIB, Plan

# What torch's tensors do not show: the CUDA context with its libraries, and holes between blocks.
# Both assumed; the first is 0.5 to 1 GiB on every CUDA program.
CONTEXT_GIB, FRAGMENTATION = 1.0, 0.02


@dataclass(frozen=True)
class Gpu:
    """What a run is planned for: the driver's or short name and all memory of one, in GiB."""

    name: str
    memory_gib: float

    @classmethod
    def here(cls) -> Gpu:
        """Return this machine's current GPU."""
        info = device_info()
        return cls(info.name, info.memory_gib)

    @classmethod
    def named(cls, name: str, where: str = "") -> Gpu:
        """Return a product.

        Args:
            name: of it.
            where: it was named, for the message; by default --gpus.

        Raises:
            UsageError: it is not in the table.
        """
        if spec := find_device(name):
            return cls(spec.name, spec.memory_gib)
        where = where or f"--gpus {name}"
        raise UsageError(
            f"{where}: unknown; known are {', '.join(device_names())}, and of other makers than "
            "NVIDIA none: the kernels are neither compiled nor tested for those"
        )

    @property
    def reserve_gib(self) -> float:
        """What tensors cannot have: the context and the holes between blocks."""
        return CONTEXT_GIB + FRAGMENTATION * self.memory_gib


@dataclass(frozen=True)
class RunPlan:
    """One run on one kind of GPU.

    Attributes:
        engine: what spreads it.
        processes: one per GPU.
        memory: all but activations.
        activations: None where other experts than ours compute, whose memory is not counted.
        layers: number of layers by checkpointing policy.
        tokens: of a micro-batch.
        row: of a packed row.
        gpu: None if unknown.
        expected: from the roofline; None for a device without rates.
        cast_bytes: moved per micro-batch by casts of the experts' weights.
    """

    engine: Engine
    processes: int
    memory: Plan
    activations: ActivationPlan | None
    layers: Mapping[Policy, int]
    tokens: int
    row: int
    gpu: Gpu | None
    expected: StepTime | None
    cast_bytes: int = 0

    def components(self) -> dict[str, int]:
        """Return bytes on each GPU by component."""
        activations = 0 if self.activations is None else self.activations.total(self.tokens)
        return {**self.memory.components(activations), "activations": activations}

    @property
    def tensors_gib(self) -> float:
        """All that tensors take on each GPU at the highest point of a step, in GiB."""
        return sum(self.components().values()) / GIB

    @property
    def total_gib(self) -> float:
        """The same with what cannot be used, in GiB."""
        return self.tensors_gib + (0 if self.gpu is None else self.gpu.reserve_gib)

    @property
    def fits(self) -> bool | None:
        """Whether the GPU holds it; None where the GPU or the activations are not known."""
        if self.gpu is None or self.activations is None:
            return None
        return self.total_gib <= self.gpu.memory_gib

    @property
    def tokens_that_fit(self) -> int | None:
        """The largest micro-batch, in whole rows, under the same policies; None if unknown."""
        if self.gpu is None or self.activations is None:
            return None
        usable = (self.gpu.memory_gib - self.gpu.reserve_gib) * GIB
        if usable < sum(self.memory.components().values()):
            return 0
        # What the update alone needs can lie where activations have been.
        beside = sum(self.memory.components(activations=int(usable)).values())
        return self.activations.fitting(usable - beside, self.row)

    def check(self) -> None:
        """Raise if the run does not fit.

        Raises:
            DoesNotFitError: with what is missing.
        """
        if self.fits is False and self.gpu is not None:
            raise DoesNotFitError(
                f"the plan needs {self.total_gib:.1f} GiB and a {self.gpu.name} has "
                f"{self.gpu.memory_gib:.1f} GiB"
            )

    def lines(self) -> Iterator[str]:
        """Yield the lines to print."""
        over = f" over {self.processes} processes" if self.processes > 1 else ""
        yield f"engine: {self.engine}{over}"
        yield from self.memory.lines()
        if self.activations is None:
            yield "activations: not counted for experts other than scatter_moe"
        else:
            yield f"activation checkpointing: {describe_layers(self.layers)}"
            yield from self.activations.lines(self.tokens)
        if self.cast_bytes:
            yield (
                f"casts of the experts' weights move {self.cast_bytes / 1e9:.0f} GB per "
                "micro-batch: --dtype bfloat16 --optim adamw_torch_8bit has none, and keeps 6 "
                "bytes per parameter, not AdamW's 16; it rounds stochastically "
                "(docs/performance.md)"
            )
        if self.gpu is not None:
            yield from self._verdict(self.gpu)

    def _verdict(self, gpu: Gpu) -> Iterator[str]:
        yield f"  {gpu.reserve_gib:10.2f} GiB  CUDA context and holes between blocks, assumed"
        yield f"in all {self.total_gib:.2f} GiB of {gpu.memory_gib:.2f} GiB on a {gpu.name}"
        tokens = self.tokens_that_fit
        if tokens is not None:
            word = "fits" if self.fits else "DOES NOT FIT"
            yield f"{word}: up to {tokens:,} tokens per micro-batch, {self.tokens:,} asked for"
        if self.expected is not None:
            yield (
                f"expected {self.expected.tokens_per_second:,.0f} tok/s per GPU, "
                f"{self.expected.step_s:.2f} s per step, in documents as long as a row (computed "
                "from assumed rates, not measured)"
            )


def describe_layers(layers: Mapping[Policy, int]) -> str:
    """Return `selective in 36 of 48 layers, none in 12 of 48 layers`."""
    of = f"of {sum(layers.values())} layers"
    return ", ".join(f"{policy} in {count} {of}" for policy, count in layers.items() if count)

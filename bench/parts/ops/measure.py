"""One implementation on one case: is it right, is it the same twice, how fast, how much memory.

Nothing is timed that is wrong. Forward and backward are timed in one loop and not with
`triton.testing.do_bench`, because some backward passes write into what the forward pass saved and
cannot run twice; the method is do_bench's: CUDA events, the L2 cache overwritten before each
timed call, medians.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from parts.ops.case import LIMITS, RESULTS, Case, Inputs, make_inputs, reference, rms_ratio
from parts.ops.peers import Run

FLUSH_BYTES = 256 * 2**20  # several times the L2 cache: 50 MB on an H100
SECONDS = {"cuda": 0.6, "cpu": 0.1}  # of timing per case
REPEATS = {"cuda": (10, 100), "cpu": (3, 10)}


class Stopwatch:
    """Times calls on one device."""

    def __init__(self, device: str) -> None:
        self.is_cuda = device == "cuda"
        self.flush = torch.empty(
            FLUSH_BYTES if self.is_cuda else 0, dtype=torch.int8, device=device
        )
        self.spans: list[tuple[Any, Any]] = []

    def time(self, call: Callable[[], Any]) -> Any:
        """Return what `call` returns, its time kept for `read`."""
        if not self.is_cuda:
            start = time.perf_counter()
            result = call()
            self.spans.append((start, time.perf_counter()))
            return result
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        start.record()
        result = call()
        end.record()
        self.spans.append((start, end))
        return result

    def read(self) -> list[float]:
        """Return the milliseconds of each call since the last reading."""
        spans, self.spans = self.spans, []
        if not self.is_cuda:
            return [(end - start) * 1e3 for start, end in spans]
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in spans]


def repeats(device: str, milliseconds: float) -> int:
    """Return how many calls of this length are timed."""
    fewest, most = REPEATS[device]
    return min(most, max(fewest, int(SECONDS[device] * 1e3 / milliseconds)))


def summary(milliseconds: list[float]) -> dict[str, float]:
    """Return the median, the 20th and the 80th percentile."""
    cuts = statistics.quantiles(milliseconds, n=5, method="inclusive")
    return {"median": statistics.median(milliseconds), "p20": cuts[0], "p80": cuts[3]}


def measure(run: Run, case: Case) -> dict[str, Any]:
    """Check, then time. Times and memory are left out of the result where the check failed."""
    torch.set_float32_matmul_precision("highest")
    inputs = make_inputs(case)
    start = time.perf_counter()
    compute(run, inputs)
    _synchronize(case.device)
    result: dict[str, Any] = {"first_call_s": time.perf_counter() - start}
    rows_E = inputs.top_k_index.flatten().bincount(minlength=case.experts)
    result["rows_max_over_mean"] = rows_E.max().item() / rows_E.float().mean().item()

    _poison(case)
    first = compute(run, inputs)
    result["rms_errors"] = errors(first, inputs)
    if problem := refusal(result["rms_errors"], LIMITS[case.torch_dtype]):
        return {"status": "failed", "reason": f"wrong: {problem}"} | result
    second = compute(run, inputs)
    result["bit_equal"] = all(map(torch.equal, first, second))
    del first, second
    return {"status": "ok"} | result | memory(run, inputs) | times(run, inputs, case)


def compute(run: Run, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """Return `RESULTS`."""
    out_TD = run(*inputs.arguments)
    return (out_TD.detach(), *torch.autograd.grad(out_TD, inputs.leaves, inputs.grad))


def errors(found: tuple[torch.Tensor, ...], inputs: Inputs) -> dict[str, float]:
    """Return the RMS ratio of each of `RESULTS` to the reference."""
    truth = reference(inputs)
    return {n: rms_ratio(f, t) for n, f, t in zip(RESULTS, found, truth, strict=True)}


def refusal(ratios: dict[str, float], limit: float) -> str | None:
    """Say which result is too far from the reference, None if all are within the limit."""
    # NaN is not below any limit.
    far = [f"{name} {ratio:.1e}" for name, ratio in ratios.items() if not ratio <= limit]
    return f"{', '.join(far)}; allowed RMS ratio {limit:.0e}" if far else None


def times(run: Run, inputs: Inputs, case: Case) -> dict[str, Any]:
    """Return `forward`, `backward` and `both`: milliseconds and TFLOP/s at the median."""
    watches = (Stopwatch(case.device), Stopwatch(case.device))

    def once() -> None:
        out_TD = watches[0].time(lambda: run(*inputs.arguments))
        watches[1].time(lambda: torch.autograd.grad(out_TD, inputs.leaves, inputs.grad))

    for _ in range(3):
        once()
    count = repeats(case.device, sum(watch.read()[-1] for watch in watches))
    for _ in range(count):
        once()
    forward, backward = (watch.read() for watch in watches)
    return phases(case, forward, backward) | {"repeats": count}


def phases(case: Case, forward: list[float], backward: list[float]) -> dict[str, Any]:
    """Return the table's three phases from milliseconds; 6, 12 and 18 * T * K * D * F FLOP."""
    both = [f + b for f, b in zip(forward, backward, strict=True)]
    found = {}
    for name, products, values in (
        ("forward", 3, forward),
        ("backward", 6, backward),
        ("both", 9, both),
    ):
        ms = summary(values)
        found[name] = {"ms": ms, "tflops": products * case.product_flops / ms["median"] / 1e9}
    return found


def memory(run: Run, inputs: Inputs) -> dict[str, Any]:
    """Return what one step needs beyond its inputs, gradients included, and what it saves.

    On a GPU both come from the allocator, so that nothing escapes. On a CPU there is no such
    count: the peak is None, and the saved bytes are those of the tensors that autograd was given.
    """
    if not inputs.x.is_cuda:
        return {
            "peak_gib": None,
            "saved_bytes_per_token": _saved_bytes(run, inputs) / len(inputs.x),
        }
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out_TD = run(*inputs.arguments)
    saved = torch.cuda.memory_allocated() - before - out_TD.nbytes
    torch.autograd.grad(out_TD, inputs.leaves, inputs.grad)
    return {
        "peak_gib": (torch.cuda.max_memory_allocated() - before) / 2**30,
        "saved_bytes_per_token": saved / len(inputs.x),
    }


def _saved_bytes(run: Run, inputs: Inputs) -> int:
    storages: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out_TD = run(*inputs.arguments)
    for tensor in (*inputs, out_TD):
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _poison(case: Case) -> None:
    """Leave NaN in the memory that the next call's uninitialised tensors get."""
    if case.device == "cuda":
        rows = case.tokens * case.top_k
        block = torch.empty(10 * rows * case.hidden, dtype=torch.bfloat16, device="cuda")
        block.fill_(math.nan)
        del block

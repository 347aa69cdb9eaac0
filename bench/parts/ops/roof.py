"""Ceilings: what dense products of the same sizes, one big product and a copy reach.

The roof gives every expert T * K / E rows that lie ready and computes the three products of a
forward and the six of a backward pass as torch.bmm, without gathers, activations or sums.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from parts.ops.case import Case
from parts.ops.measure import Stopwatch, phases, repeats, summary

SQUARE = {"cuda": 8192, "cpu": 512}
COPY_BYTES = {"cuda": 4 * 2**30, "cpu": 64 * 2**20}


def measure_roof(case: Case) -> dict[str, Any]:
    """Return the phases of `ops_measure.times`, and each product and ceiling by itself."""
    timed = {name: _time(case, call) for name, call in _products(case).items()}
    forward, backward = (
        [sum(values) for values in zip(*(timed[name] for name in names), strict=False)]
        for names in (("up", "down"), ("dact", "down wgrad", "dx", "up wgrad"))
    )
    fewest = min(len(forward), len(backward))
    return {
        "status": "ok",
        "products": {name: summary(values)["median"] for name, values in timed.items()},
        **phases(case, forward[:fewest], backward[:fewest]),
        **_ceilings(case),
    }


def _products(case: Case) -> dict[str, Callable[[], torch.Tensor]]:
    rows, hidden, width = case.tokens * case.top_k // case.experts, case.hidden, case.intermediate

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(case.experts, *shape, dtype=case.torch_dtype, device=case.device)

    x, act, h, up, down = (
        draw(*shape)
        for shape in (
            (rows, hidden), (rows, width), (rows, 2 * width), (2 * width, hidden), (hidden, width)
        )
    )  # fmt: skip
    return {
        "up": lambda: torch.bmm(x, up.mT),
        "down": lambda: torch.bmm(act, down.mT),
        "dact": lambda: torch.bmm(x, down),
        "down wgrad": lambda: torch.bmm(x.mT, act),
        "dx": lambda: torch.bmm(h, up),
        "up wgrad": lambda: torch.bmm(h.mT, x),
    }


def _ceilings(case: Case) -> dict[str, float]:
    side, size = SQUARE[case.device], COPY_BYTES[case.device]
    a, b = (torch.randn(side, side, dtype=case.torch_dtype, device=case.device) for _ in range(2))
    product_ms = summary(_time(case, lambda: a @ b))["median"]
    source = torch.empty(size, dtype=torch.uint8, device=case.device).random_()
    target = torch.empty_like(source)
    copy_ms = summary(_time(case, lambda: target.copy_(source)))["median"]
    return {
        "square_side": side,
        "square_tflops": 2 * side**3 / product_ms / 1e9,
        "copy_read_and_write_gb_per_s": 2 * size / copy_ms / 1e6,
    }


def _time(case: Case, call: Callable[[], Any]) -> list[float]:
    watch = Stopwatch(case.device)
    for _ in range(3):
        watch.time(call)
    for _ in range(repeats(case.device, 4 * watch.read()[-1])):
        watch.time(call)
    return watch.read()

"""The report of the race as Markdown: one table per case, failures below it with their reason."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

PHASES = ("forward", "backward", "both")
HEAD = "| implementation | fwd ms | bwd ms | both ms | TFLOP/s fwd / bwd / both | peak GiB | saved B/token | worst RMS error | bit-equal |"  # noqa: E501


def table(report: dict[str, Any]) -> str:
    """Return the whole report; times are medians."""
    results = report["results"]
    lines = [f"## Mixture of experts on {report['device']}, commit {report['commit']}"]
    if mark := report.get("mark"):
        lines.append(f"\n**{mark}**")
    for _, group in groupby(results, key=lambda result: result["case"]):
        lines += _case(list(group))
    lines += _ceilings(results)
    return "\n".join(lines)


def _case(results: list[dict[str, Any]]) -> Iterator[str]:
    case = results[0]["case"]
    clock = (
        "CUDA events, cold L2" if case["device"] == "cuda" else "CPU wall clock: not a GPU figure"
    )
    yield (
        f"\n### T={case['tokens']} {case['routing']}, {case['dtype']}, D={case['hidden']} "
        f"F={case['intermediate']} E={case['experts']} K={case['top_k']} ({clock})"
    )
    rows = [_row(result) for result in results if result["status"] == "ok"]
    if rows:
        yield from (HEAD, "|---|" + "---:|" * 8, *rows)
    for result in results:
        if result["status"] != "ok":
            reason = " ".join(result["reason"].split())
            yield f"- {result['name']}: {result['status']}: {reason[:200]}"


def _row(result: dict[str, Any]) -> str:
    errors = result.get("rms_errors")
    cells = [
        result["name"],
        *(f"{result[phase]['ms']['median']:.3f}" for phase in PHASES),
        " / ".join(_number(result[phase]["tflops"]) for phase in PHASES),
        _number(result.get("peak_gib"), ".2f"),
        _number(result.get("saved_bytes_per_token"), ",.0f"),
        "-" if errors is None else f"{max(errors.values()):.1e}",
        {True: "yes", False: "no", None: "-"}[result.get("bit_equal")],
    ]
    return f"| {' | '.join(cells)} |"


def _number(value: float | None, form: str = ".3g") -> str:
    return "-" if value is None else format(value, form)


def _ceilings(results: list[dict[str, Any]]) -> Iterator[str]:
    for result in results:
        if "square_tflops" in result:
            yield (
                f"\nCeilings: {result['square_side']}^3 product "
                f"{result['square_tflops']:.3g} TFLOP/s; copy "
                f"{result['copy_read_and_write_gb_per_s']:.0f} GB/s, read and written."
            )
            return

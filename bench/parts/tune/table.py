"""From timings to rows of tiles.json, and the file itself."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from itertools import pairwise
from typing import Any

from parts.tune.measure import PRODUCTS, Timing

from monkey_patch.kernels.scatter_moe.triton.tiles import Tiles

Row = dict[str, Any]

_TIMES = ("ms", "tflops")
_LARGE_BATCH = 2048  # rows per expert: 32,768 tokens, 8 of 128 experts each


def fastest(timings: Iterable[Timing]) -> Timing | None:
    """Return the timing with the least mean over the routings, the earlier of equals.

    None where every one has a problem.
    """
    best = min(timings, key=lambda timing: timing.mean_ms, default=None)
    return None if best is None or math.isinf(best.mean_ms) else best


def tflops(timing: Timing, product_flops: int) -> float:
    """Return the rate over the mean of the routings; `product_flops` as in `ops_case.Case`."""
    return PRODUCTS[timing.stage] * product_flops / timing.mean_ms / 1e9


def row_of(timing: Timing, product_flops: int) -> Row:
    """Return the cut as the table has it, with its time and rate."""
    figures = (timing.mean_ms, tflops(timing, product_flops))
    rounded = (float(f"{figure:.4g}") for figure in figures)
    return cut_row(timing.cut) | dict(zip(_TIMES, rounded, strict=True))


def cut_row(cut: Tiles) -> Row:
    """Return the fields of a cut that differ from the defaults."""
    named = ((field.name, getattr(cut, field.name), field.default) for field in fields(cut))
    return {name: value for name, value, default in named if value != default}


def sizes(rows: Iterable[Sequence[tuple[int | None, Tiles]]]) -> list[int]:
    """Return the rows per expert to measure, one number for each bucket of an architecture.

    They are two thirds up each bucket, and for the last, which has no end, what 32,768 tokens of
    Qwen3-30B-A3B come to, or more where the bucket begins so late.

    Args:
        rows: of each stage, as `read_table` returns them.
    """
    limits = sorted({limit for stage in rows for limit, _ in stage if limit is not None})
    last = max(_LARGE_BATCH, 4 * limits[-1]) if limits else _LARGE_BATCH
    return [*(limit * 2 // 3 for limit in limits), last]


def merge(measured: Mapping[int, Row], shipped: Sequence[Row]) -> list[Row]:
    """Return the rows of one stage with those measured in the place of the shipped ones.

    A bucket in which nothing was measured keeps its cut, without the time of another day. Several
    sizes measured in one bucket share it; the border is their geometric mean.

    Args:
        measured: row by rows per expert.
        shipped: rows with `max_rows`, ascending.
    """
    found: list[Row] = []
    begin = -1
    for row in shipped:
        end = math.inf if row["max_rows"] is None else row["max_rows"]
        inside = sorted(size for size in measured if begin < size <= end)
        borders = [round(math.sqrt(small * large)) for small, large in pairwise(inside)]
        cuts = [measured[size] for size in inside] or [_without_times(row)]
        limits = [*borders, row["max_rows"]]
        found += [{**cut, "max_rows": limit} for cut, limit in zip(cuts, limits, strict=True)]
        begin = end
    return found


def _without_times(row: Row) -> Row:
    return {k: v for k, v in row.items() if k not in _TIMES}


def updated(
    table: Mapping[str, Any],
    architecture: str,
    measured: Mapping[str, Mapping[int, Row]],
    origin: str,
) -> dict[str, Any]:
    """Return the content of tiles.json with new rows for one architecture.

    Args:
        table: the content to start from; other architectures stay as they are.
        architecture: whose rows are made; a new one starts from "default".
        measured: stage -> rows per expert -> row; stages may be missing.
        origin: where the times come from.
    """
    tiles, origins = table["tiles"], table["origin"]
    source = architecture if architecture in tiles else "default"
    stages = {stage: merge(measured.get(stage, {}), rows) for stage, rows in tiles[source].items()}
    if not all(_TIMES[0] in row for rows in stages.values() for row in rows):
        origin = f"rows with ms: {origin}; the others: {origins[source]}"
    return {"origin": origins | {architecture: origin}, "tiles": tiles | {architecture: stages}}


def table_text(table: Mapping[str, Any]) -> str:
    """Return the content of tiles.json as text, one row per line."""
    origins = [f"  {json.dumps(name)}: {json.dumps(o)}" for name, o in table["origin"].items()]
    architectures = [
        f"  {json.dumps(name)}: {{\n{_joined(_stage_text(*one) for one in stages.items())}\n  }}"
        for name, stages in table["tiles"].items()
    ]
    return (
        f'{{\n "origin": {{\n{_joined(origins)}\n }},\n'
        f' "tiles": {{\n{_joined(architectures)}\n }}\n}}\n'
    )


def _stage_text(stage: str, rows: Iterable[Row]) -> str:
    lines = (f"    {json.dumps(_max_rows_first(row))}" for row in rows)
    return f"   {json.dumps(stage)}: [\n{_joined(lines)}\n   ]"


def _max_rows_first(row: Row) -> Row:
    return {"max_rows": row["max_rows"]} | row


def _joined(parts: Iterable[str]) -> str:
    return ",\n".join(parts)

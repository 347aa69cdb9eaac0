"""README's two tables, from result files or the words "not measured yet".

They stand between comments: `<!-- headline -->` ... `<!-- /headline -->`, and so for `ladder`.
A file that does not belong to its table (another shape, device or depth) is an error, so that no
table mixes measurements.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
NONE = "not measured yet"
HOW = "[how](docs/performance.md#steps-and-the-ladder)"


@dataclass(frozen=True)
class Goal:
    """One line of the headline table.

    Attributes:
        label: what is trained.
        least: tokens per second that it must reach; two where it has two lengths.
        aim: tokens per second aimed at.
        files: names of the result files, as `bench/step.py --out` writes them.
    """

    label: str
    least: tuple[int, ...]
    aim: tuple[int, ...]
    files: tuple[str, ...]


GOALS = (
    Goal("documents of 4,096 tokens, 8-bit Adam", (13011,), (15500,), ("headline_4096.json",)),
    Goal("packed documents, mean 577 tokens", (8655,), (19500,), ("headline_packed.json",)),
    Goal("documents of 32k / 128k tokens", (4000, 1300), (6300, 2000),
         ("headline_32k.json", "headline_128k.json")),
)  # fmt: skip


def readme(text: str, rungs: Sequence[Any], ladder_folder: Path, headline_folder: Path) -> str:
    """Return the text with both tables as the files say.

    Args:
        text: of README.md.
        rungs: `ladder.LADDER`.
        ladder_folder: one file per row of the ladder.
        headline_folder: the files of `GOALS`.

    Raises:
        ValueError: the text lacks a marker, or a file does not belong to its table.
    """
    text = _between(text, "headline", list(headline(headline_folder)))
    return _between(text, "ladder", list(ladder(rungs, ladder_folder)))


def _between(text: str, name: str, lines: list[str]) -> str:
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"the text needs <!-- {name} --> and <!-- /{name} --> once each")
    body = "".join(f"{line}\n" for line in lines)
    return pattern.sub(lambda match: match[1] + body + match[2], text)


def headline(folder: Path) -> Iterator[str]:
    """Yield the lines of the headline table."""
    yield "| all parameters of Qwen3-30B-A3B on one H200, tok/s | at least | aim | measured |"
    yield "|---|---|---|---|"
    for goal in GOALS:
        measured = " / ".join(_headline_figure(folder / name) for name in goal.files)
        if set(measured.split(" / ")) == {NONE}:
            measured = NONE
        yield f"| {goal.label} | {_rates(goal.least)} | {_rates(goal.aim)} | {measured} |"


def _rates(rates: tuple[int, ...]) -> str:
    return " / ".join(f"{rate:,}" for rate in rates)


def _headline_figure(file: Path) -> str:
    if not file.is_file():
        return NONE
    report = _load(file)
    row = next(row for row in report["results"] if row["name"] == "ours")
    options = row["options"]
    if options["model"] != "30b" or options["layers"] not in (None, 48):
        raise ValueError(
            f"{file}: model {options['model']} with {options['layers']} layers; the headline is "
            "for the 30B model at full depth: remove the file"
        )
    if "H200" not in report["device"]:
        raise ValueError(f"{file}: measured on {report['device']}, not an H200: remove the file")
    figure = "failed" if "error" in row else f"{row['tokens_per_second']:,.0f}"
    return f"[{figure}]({_link(file)})"


def ladder(rungs: Sequence[Any], folder: Path) -> Iterator[str]:
    """Yield the lines of the ablation table: each row against the one before."""
    results = {rung.name: _load(folder / f"{rung.name}.json") for rung in rungs}
    known = [result for result in results.values() if result]
    if not known:
        steps = ", ".join(rung.name.replace("_", " ") for rung in rungs[1:])
        yield f"What each part brings to plain transformers ({steps}): {NONE} ({HOW})."
        return
    _check_same(rungs, results)
    yield _caption(known)
    yield ""
    yield "| one change per row | tok/s | change | MFU | peak GiB |"
    yield "|---|---:|---:|---:|---:|"
    before: float | None = None
    for rung in rungs:
        result = results[rung.name]
        label = rung.label if not result else f"[{rung.label}]({_link(folder / rung.name)}.json)"
        yield f"| {label} | {' | '.join(_cells(result, before))} |"
        before = result.get("tokens_per_second") if result else None


def _load(file: Path) -> dict[str, Any]:
    report = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if mark := report.get("mark"):
        raise ValueError(f"{file}: no measurement ({mark}): remove the file")
    return report


def _link(file: Path) -> str:
    file = file.resolve()
    return str(file.relative_to(ROOT)) if file.is_relative_to(ROOT) else str(file)


def _check_same(rungs: Sequence[Any], results: dict[str, dict[str, Any]]) -> None:
    """Raise unless each row's options are those of the row before and its own change."""
    expected: dict[str, Any] | None = None
    device = None
    for rung in rungs:
        expected = None if expected is None else {**expected, **rung.change}
        result = results[rung.name]
        if not result:
            continue
        found = result["options"]
        expected, device = expected or found, device or result["device"]
        wrong = [name for name in found if found[name] != expected.get(name)]
        if wrong or result["device"] != device:
            raise ValueError(
                f"{rung.name}.json: {', '.join(wrong) or 'the device'} differs from the rows "
                "before it beyond the row's own change; run the whole ladder again"
            )


def _caption(known: list[dict[str, Any]]) -> str:
    first = known[0]
    options = first["options"]
    commits = ", ".join(dict.fromkeys(result["commit"] for result in known))
    depth = f"{options['layers']} layers" if options["layers"] else "all layers"
    return (
        f"{first['device']}, {options['model']} with {depth}, {options['batch']} rows of "
        f"{options['max_length']:,} per step, {options['dtype']}, {options['optim']}, "
        f"{options['routing']} routing; commit {commits} ({HOW})."
    )


def _cells(result: dict[str, Any], before: float | None) -> list[str]:
    if not result:
        return ["not run", "", "", ""]
    if error := result.get("error"):
        return [f"failed: {error[:60].replace('|', '/')}", "", "", ""]
    rate, mfu = result["tokens_per_second"], result["mfu_of_device"]
    change = "" if before is None else f"x {rate / before:.2f}"
    if "without_effect" in result:
        change = "no effect here"
    return [
        f"{rate:,.0f}",
        change,
        "-" if mfu is None else f"{100 * mfu:.1f}%",
        f"{result['peak_allocated_gib']:.1f}",
    ]

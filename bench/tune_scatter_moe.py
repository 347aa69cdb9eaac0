"""Time the cuts of the expert kernels on this GPU and write its rows of tiles.json.

Qwen3-30B-A3B's layer in bf16. Candidates are compiled in other processes and thrown out where they
spill; the others are checked against plain torch and timed, the largest batch and its longest stage
first, under nearly uniform and under Zipf routing. The fastest is the one with the least mean of
both medians. A run that is out of time keeps the shipped cuts for what it did not reach.

    python bench/tune_scatter_moe.py --seconds 180 --out tune.json --write
    python bench/tune_scatter_moe.py --dry_run --architecture sm_90      # on a CPU: only compiles
    TRITON_INTERPRET=1 python bench/tune_scatter_moe.py --tokens 32      # on a CPU: the harness
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from parts.ops.case import Case
from parts.result_file import provenance, write
from parts.tune.candidates import INTERPRETER, Compiled, Compiling, candidates
from parts.tune.measure import PRODUCTS, Timing, Workload
from parts.tune.table import Row, cut_row, fastest, row_of, sizes, table_text, tflops, updated
from parts.tune.text import candidate_lines, timing_lines

from monkey_patch.kernels.aot import TARGETS
from monkey_patch.kernels.scatter_moe.triton.catalogue import QWEN3_30B
from monkey_patch.kernels.scatter_moe.triton.tiles import (
    TABLE,
    Tiles,
    architecture_of,
    choose_tiles,
    read_table,
)

ROUTINGS = ("uniform", "zipf")
PERSISTENT = 2  # so many of the fastest are tried again on a grid of what fits at once
MARGIN_SECONDS = 3.0  # kept back for writing


class StoppedError(Exception):
    """The tuner cannot go on; what it has is kept."""


class Tuner:
    """Compiles and times candidates.

    Args:
        options: the command line.
        facts: what the report starts with.

    Attributes:
        compiled: what the compiler made of the cuts waited for, by stage and cut.
        timings: in the order in which they were taken.
        stopped: why not everything was done, None if it was.
    """

    def __init__(self, options: argparse.Namespace, facts: dict[str, Any]) -> None:
        self.options, self.facts = options, facts
        self.deadline = time.monotonic() + options.seconds - MARGIN_SECONDS
        self.compiled: dict[tuple[str, Tiles], Compiled] = {}
        self.timings: list[Timing] = []
        self.stopped: str | None = None
        tiles = read_table(json.loads(TABLE.read_text(encoding="utf-8")))
        rows = tiles.get(options.architecture, tiles["default"])
        self.tokens = options.tokens or list(map(self._tokens, sizes(rows.values())))
        shipped = {s: list(dict.fromkeys(cut for _, cut in rows[s])) for s in options.stages}
        self.cuts = {
            stage: candidates(stage, options.architecture, cuts, options.candidates)
            for stage, cuts in shipped.items()
        }
        self.compiling = Compiling(QWEN3_30B, options.architecture, options.workers)
        # The times of the shipped cuts decide which stage is next, so they are compiled first.
        for stage, cuts in (*shipped.items(), *self.cuts.items()):
            for cut in cuts:
                self.compiling.start(stage, cut)

    def run(self) -> None:
        """Compile and time until all is done or the time is over."""
        try:
            if self.options.dry_run:
                for stage, cuts in self.cuts.items():
                    for cut in cuts:
                        self._compile(stage, cut)
            else:
                for tokens in sorted(self.tokens, reverse=True):
                    self._tune(tokens)
        except StoppedError as stop:
            self.stopped = str(stop)
        self.compiling.close()

    def _tune(self, tokens: int) -> None:
        self._left()
        work = [Workload(self._case(tokens, routing)) for routing in ROUTINGS]
        case = work[0].case
        shipped = {s: self._time(s, self.shipped_cut(s, tokens), work) for s in self.cuts}
        for stage in sorted(self.cuts, key=lambda s: -shipped[s].mean_ms):
            found = [self._time(stage, cut, work) for cut in self.cuts[stage]]
            if case.device == "cuda":
                found = [t for t in found if t.problem is None and not t.cut.library]
                for timing in sorted(found, key=lambda t: t.mean_ms)[:PERSISTENT]:
                    self._time(stage, self._persistent(stage, timing.cut), work)
            print(f"{self.seconds_left():5.0f} s left: T={tokens} {stage}", flush=True)
            self.write_report()

    def _time(self, stage: str, cut: Tiles, work: Sequence[Workload]) -> Timing:
        """Return the timing of a cut, which is taken once."""
        case = work[0].case
        for known in self.timings:
            if (known.stage, known.tokens, known.cut) == (stage, case.tokens, cut):
                return known
        timing = Timing(stage, case.tokens, rows_per_expert(case), cut)
        timing.problem = self._compile(stage, cut).problem
        self._left()
        try:
            for workload in work:
                if timing.problem is None:
                    workload.measure(timing)
        except (RuntimeError, triton.TritonError) as error:
            timing.problem = f"{type(error).__name__}: {error}"
        self.timings.append(timing)
        self._check_device()
        return timing

    def _persistent(self, stage: str, cut: Tiles) -> Tiles:
        """Return the cut with as many programs as fit on the multiprocessors at once."""
        cut = replace(cut, persistent=True)
        return replace(cut, programs=max(1, self._compile(stage, cut).programs_per_sm))

    def _compile(self, stage: str, cut: Tiles) -> Compiled:
        self.compiling.start(stage, cut)
        try:
            compiled = self.compiling.result(stage, cut, self._left())
        except TimeoutError:
            raise StoppedError("out of time while compiling") from None
        return self.compiled.setdefault((stage, cut), compiled)

    def _left(self) -> float:
        """Return the seconds left, of which there are some."""
        left = self.seconds_left()
        if left <= 0:
            raise StoppedError("out of time")
        return left

    def seconds_left(self) -> float:
        """Return the seconds until the deadline."""
        return self.deadline - time.monotonic()

    def _check_device(self) -> None:
        """After an illegal access nothing runs in this process any more."""
        if torch.cuda.is_initialized():
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                raise StoppedError(f"the device is lost: {error}") from error

    def measured(self) -> dict[str, dict[int, Row]]:
        """Return the fastest cuts: stage -> rows per expert -> row of the table."""
        found: dict[str, dict[int, Row]] = {}
        for stage, tokens in dict.fromkeys((t.stage, t.tokens) for t in self.timings):
            best = fastest(t for t in self.timings if (t.stage, t.tokens) == (stage, tokens))
            if best:
                row = row_of(best, self._case(tokens).product_flops)
                found.setdefault(stage, {})[best.rows] = row
        return found

    def shipped_cut(self, stage: str, tokens: int) -> Tiles:
        """Return the cut that the shipped table has."""
        case = self._case(tokens)
        rows = rows_per_expert(case)
        return choose_tiles(stage, self.options.architecture, case.torch_dtype, rows)

    def write_report(self) -> None:
        """Write what there is so far to `--out`."""
        if self.options.out is None:
            return
        report = self.facts | {
            "stopped": self.stopped,
            "candidates": [
                {"stage": stage, "cut": cut_row(cut), **compiled.as_json()}
                for (stage, cut), compiled in self.compiled.items()
            ],
            "timings": [
                timing.as_json() | {"cut": cut_row(timing.cut), "tflops": self._tflops(timing)}
                for timing in self.timings
            ],
            "fastest": self.measured(),
        }
        write(self.options.out, json.dumps(report, indent=1) + "\n")

    def write_table(self) -> None:
        """Write tiles.json with the fastest cuts to `--write`."""
        origin = "timed on {device}, {date}, commit {commit}".format_map(self.facts)
        table = json.loads(TABLE.read_text(encoding="utf-8"))
        table = updated(table, self.options.architecture, self.measured(), origin)
        write(self.options.write, table_text(table))

    def _case(self, tokens: int, routing: str = ROUTINGS[0]) -> Case:
        if self.options.architecture == INTERPRETER:
            sizes = {"hidden": 64, "intermediate": 32, "experts": 4, "top_k": 2}
            return Case(tokens, routing, device="cpu", dtype="float32", **sizes)
        return Case(tokens, routing)

    def _tokens(self, rows: int) -> int:
        """Return the tokens that give so many rows per expert."""
        case = self._case(0)
        return rows * case.experts // case.top_k

    def _tflops(self, timing: Timing) -> float | None:
        product_flops = self._case(timing.tokens).product_flops
        return None if timing.problem else tflops(timing, product_flops)


def rows_per_expert(case: Case) -> int:
    """Return the average, as the table is looked up with."""
    return case.tokens * case.top_k // case.experts


def here() -> str | None:
    """Return the architecture that this process can time, None without one."""
    if torch.cuda.is_available():
        return architecture_of(torch.empty(0, device="cuda"))
    return INTERPRETER if os.environ.get("TRITON_INTERPRET") == "1" else None


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the checked command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", help=f"{', '.join(TARGETS)}; default: this GPU's")
    parser.add_argument(
        "--tokens", type=int, nargs="+", help="default: one number per bucket of the shipped table"
    )
    stages = list(PRODUCTS)
    parser.add_argument("--stages", nargs="+", choices=stages, default=stages, metavar="STAGE")
    parser.add_argument("--candidates", type=int, default=32, help="most cuts to compile per stage")
    parser.add_argument("--seconds", type=float, default=600.0, help="of the whole run")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=int, default=max(1, cores - 1), help="compilers at once")
    parser.add_argument("--dry_run", action="store_true", help="only compile; needs no GPU")
    parser.add_argument("--out", type=Path, help="the full report, JSON")
    parser.add_argument(
        "--write", type=Path, nargs="?", const=TABLE, help="new tiles.json; default: the shipped"
    )
    options = parser.parse_args(argv)
    found = here()
    options.architecture = options.architecture or found
    names = (*TARGETS, INTERPRETER) if found == INTERPRETER else TARGETS
    if options.architecture not in names:
        where = options.architecture or "no GPU here"
        parser.error(f"{where}: --architecture is one of {', '.join(names)}")
    if not options.dry_run and options.architecture != found:
        parser.error(f"--architecture {options.architecture}: only --dry_run does without its GPU")
    if options.write == TABLE and options.architecture == INTERPRETER:
        parser.error("--write PATH: what a CPU interprets says nothing for the shipped table")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Compile, time, print the tables and write what `--out` and `--write` name."""
    options = parse(argv)
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    command = vars(options) | {"out": str(options.out), "write": str(options.write)}
    facts = {"benchmark": "tune_scatter_moe", **provenance(), "date": date, "command": command}
    tuner = Tuner(options, facts)
    try:
        tuner.run()
    finally:  # a GPU's minutes are not to be lost to what nobody thought of
        tuner.write_report()
        if options.write and tuner.measured():
            tuner.write_table()
    if options.dry_run:
        lines = candidate_lines(tuner.compiled)
    else:
        lines = timing_lines(tuner.timings, tuner.shipped_cut)
    print(*lines, tuner.stopped or "complete", sep="\n")
    if not options.dry_run and not tuner.measured():
        sys.exit("nothing was timed")


if __name__ == "__main__":
    main()

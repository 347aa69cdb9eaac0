"""The race of mixture-of-experts implementations: our op, its peers and dense ceilings.

One layer of Qwen3-30B-A3B (D 2048, F 768, E 128, K 8) in bf16 on a GPU; on a CPU a small float32
layer, to try the harness. Forward, backward (all four gradients) and both, memory, and whether two
runs give the same bits. What is wrong is not timed, what cannot run is listed with the reason.

    python bench/ops.py --out bench/results/ops.json
    python bench/ops.py --tokens 4096 --only ours liger my_module:my_moe
    BENCH_PEERS=/tmp/carry/peers python bench/ops.py --seconds 190     # see bench/carry.sh

Cases are run in the order given, all implementations on one case before the next, and the result
file is rewritten after each, so that a race that runs out of time has measured what matters first.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from parts.ops.case import Case, cpu_case
from parts.ops.peers import PEERS
from parts.ops.process import Process
from parts.ops.table import table
from parts.ops.worker import ROOF
from parts.result_file import provenance, write

NAMES = (*PEERS, ROOF)
# Our own first, then what its times are read against. grouped_mm_compiled runs only when
# named: it compiles anew for each shape, and the race has minutes.
ORDER = ("ours", "ours_recompute", ROOF, "grouped_mm", "sonicmoe", "liger", "scattermoe")
TOKENS = {"cuda": (32768, 8192, 4096), "cpu": (512,)}
CASE_SECONDS = 75.0  # at most for one implementation on one case, tuning included
COMPILE_TOKENS = 512
MARGIN_SECONDS = 5.0  # kept back for writing


class Race:
    """Runs the implementations and keeps the result file up to date.

    Args:
        options: the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.deadline = time.monotonic() + options.seconds
        # All start at once: the imports of one are done while another is measured.
        self.processes = {name: Process(name) for name in options.only}
        self.report: dict[str, Any] = {"benchmark": "ops", **provenance()}
        self.report["command"] = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(options).items()
        }
        self.report |= {"versions_of_peers": {}, "results": []}

    def run(self, cases: Sequence[Case]) -> dict[str, Any]:
        """Measure until all is measured or the time is over; return the report."""
        for case, name in self._pairs(cases):
            seconds = min(self.options.case_seconds, self._left())
            if seconds <= 0:
                answer = {"status": "not run", "reason": "out of time"}
            else:
                request = {"case": case.as_json(), "only_compile": self.options.compile}
                answer = self.processes[name].ask(request, seconds)
                self.report["versions_of_peers"][name] = self.processes[name].versions
                if answer["status"] == "failed" and self._left() <= 0:
                    answer = {"status": "not run", "reason": f"out of time: {answer['reason']}"}
            self.report["results"].append({"name": name, "case": case.as_json(), **answer})
            print(f"{self._left():5.0f} s left: {name} T={case.tokens} {case.routing}: "
                  f"{answer['status']} {answer.get('reason', '')}", flush=True)  # fmt: skip
            self._write()
        for process in self.processes.values():
            process.close()
        return self.report

    def _pairs(self, cases: Sequence[Case]) -> Iterator[tuple[Case, str]]:
        for case in cases:
            for name in self.options.only:
                if name != ROOF or (case.routing == "uniform" and not self.options.compile):
                    yield case, name

    def _left(self) -> float:
        return self.deadline - time.monotonic() - MARGIN_SECONDS

    def _write(self) -> None:
        if self.options.out:
            write(self.options.out, json.dumps(self.report, indent=1) + "\n")
        if self.options.table:
            write(self.options.table, table(self.report) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the race and print its table."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS[device])
    parser.add_argument("--routing", nargs="+", default=("uniform", "zipf"))
    parser.add_argument(
        "--only", nargs="+", default=ORDER, help=f"{', '.join(NAMES)}, module:function"
    )
    parser.add_argument("--seconds", type=float, default=600.0, help="of the whole race")
    parser.add_argument("--case_seconds", type=float, default=CASE_SECONDS)
    parser.add_argument("--compile", action="store_true", help="only fill the compilers' caches")
    parser.add_argument("--out", type=Path, help="JSON, rewritten after each case")
    parser.add_argument("--table", type=Path, help="the table, likewise; it is printed in any case")
    options = parser.parse_args(argv)
    if unknown := set(options.routing) - {"uniform", "zipf"}:
        parser.error(f"--routing {' '.join(sorted(unknown))}: choose from uniform, zipf")
    if unknown := [name for name in options.only if name not in NAMES and ":" not in name]:
        parser.error(f"--only {' '.join(unknown)}: choose from {', '.join(NAMES)}, module:function")
    make = Case if device == "cuda" else cpu_case
    shapes = [(COMPILE_TOKENS, "uniform")]
    if not options.compile:
        shapes = [(tokens, routing) for routing in options.routing for tokens in options.tokens]
    report = Race(options).run([make(*shape) for shape in shapes])
    if not options.compile:
        print(table(report))
        if problem := shortcoming(report["results"]):
            raise SystemExit(problem)


def shortcoming(results: Sequence[dict[str, Any]]) -> str | None:
    """Return why the race is not one, if so: ours failed, or nothing was measured."""
    for result in results:
        if result["status"] == "failed" and result["name"] in ("ours", "ours_recompute"):
            return f"failed: {result['name']}, T={result['case']['tokens']}: {result['reason']}"
    if not any(result["status"] == "ok" for result in results):
        return "nothing was measured"
    return None


if __name__ == "__main__":
    main()

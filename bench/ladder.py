"""What each part brings: from plain transformers to all of ours, one change per row.

    python bench/ladder.py --run --model 30b --layers 4 --max_length 4096 --batch 4 --dtype autocast
    python bench/ladder.py --table      # the two tables of README.md, from the files there are

`--run` measures the rows through `parts/step/measure.py` in one process and writes one file per
row as soon as it is known, so that a run that is cut off keeps what it has. Options that no row
changes (model, depth, lengths, dtype, optimizer, routing) are those of `bench/step.py`. A row that
fails is a result too: its file holds the error. All rows share the trainer, the data and the cross
entropy in chunks of labelled positions; `parts/step/rows.py` says how each attention's batch is
laid out.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from parts.ladder_table import readme
from parts.result_file import provenance, write
from parts.step.measure import attempt
from parts.step.options import TRANSFORMERS, StepOptions, pick
from step import parser

from qwen3_sft.logs import set_up_logging

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results" / "gpu"


@dataclass(frozen=True)
class Rung:
    """One row.

    Attributes:
        name: of its file.
        label: in the table.
        change: the option that differs from the row before, and its value.
        effect: what has to be resolved for the change to have had one on this device.
    """

    name: str
    label: str
    change: dict[str, Any] = field(default_factory=dict)
    effect: dict[str, Any] = field(default_factory=dict)


LADDER = (
    Rung("baseline", "transformers: grouped_mm, sdpa, full checkpointing, one document per row"),
    # Not True: the compiler, further down, does norms and RoPE itself where that is left open.
    Rung("liger", "+ Liger's RMSNorm and RoPE", {"use_liger": None}, {"use_liger": True}),
    Rung("packing", "+ packing", {"packing": True}),
    Rung("scatter_moe", "+ ScatterMoE experts", {"experts_implementation": "scatter_moe"}),
    Rung("router", "+ router in one kernel, with balance loss", {"router_aux_loss": True}),
    Rung("selective", "+ selective checkpointing", {"activation_checkpointing": "selective"}),
    Rung("compile", "+ compiled layers, norms and RoPE in place of Liger's",
         {"torch_compile": True}),
    Rung("attention", "+ varlen attention kernels", {"attn_implementation": "auto"},
         {"layout": "flat"}),
    Rung("fp8", "+ FP8 experts and attention between the first and the last layer",
         {"fp8": "all"}),
)  # fmt: skip
# Where the ladder starts; the rest of the options is the caller's.
START: dict[str, Any] = {
    name: {**TRANSFORMERS, "packing": False}[name] for rung in LADDER for name in rung.change
}


def ladder(options: StepOptions) -> Iterator[tuple[Rung, StepOptions]]:
    """Yield each row with its options."""
    options = replace(options, **START, breakdown=False)
    for rung in LADDER:
        options = replace(options, **rung.change)
        yield rung, options


def climb(options: StepOptions, names: Sequence[str], folder: Path, seconds: float) -> list[str]:
    """Measure the rows and write a file for each; stop when the next could take too long.

    Returns:
        What failed: names of rows with their errors.
    """
    failed = []
    facts, began, longest = provenance(), time.monotonic(), 0.0
    for rung, chosen in ladder(options):
        if rung.name not in names:
            continue
        left = seconds - (time.monotonic() - began)
        if left < longest:
            print(f"{rung.name}: not run, {left:.0f} s are left and a row took {longest:.0f} s")
            continue
        started = time.monotonic()
        result = {"benchmark": "ladder", "row": rung.name, **facts, **row(rung, chosen)}
        longest = max(longest, time.monotonic() - started)
        write(folder / f"{rung.name}.json", json.dumps(result, indent=1) + "\n")
        print(f"{rung.name}: {result.get('error') or result['tokens_per_second']}", flush=True)
        if "error" in result:
            failed.append(f"{rung.name}: {result['error']}")
    return failed


def row(rung: Rung, options: StepOptions) -> dict[str, Any]:
    """Return the measurement of one row, or its options and the error that it ended with."""
    result = attempt(options)
    if "error" in result:
        return result
    found = {name: result["resolved"][name] for name in rung.effect}
    if found != rung.effect:
        result["without_effect"] = f"{found} on this device"
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Run the rows, or write the tables."""
    made = parser(__doc__)
    made.add_argument("--run", action="store_true", help="measure")
    made.add_argument("--table", action="store_true", help="write the tables of README.md")
    names = [rung.name for rung in LADDER]
    made.add_argument("--rows", nargs="+", choices=names, default=names)
    made.add_argument("--folder", type=Path, default=RESULTS / "ladder")
    made.add_argument("--seconds", type=float, default=float("inf"), help="for all rows")
    made.add_argument("--readme", type=Path, default=ROOT / "README.md", help=argparse.SUPPRESS)
    chosen = made.parse_args(argv)
    if not chosen.run and not chosen.table:
        made.error("choose --run, --table or both")
    set_up_logging()
    failed = []
    if chosen.run:
        failed = climb(pick(vars(chosen)), chosen.rows, chosen.folder, chosen.seconds)
    if chosen.table:
        text = chosen.readme.read_text(encoding="utf-8")
        write(chosen.readme, readme(text, LADDER, chosen.folder, chosen.folder.parent))
    if failed:
        raise SystemExit(f"failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()

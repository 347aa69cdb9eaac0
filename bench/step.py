"""Time whole training steps through the trainer that a run uses.

20 steps after 5, with random weights at full width, in the arguments that a run would resolve.
Each name in `--rows` is one measurement in the same process: `ours` is what the options say,
`transformers` is plain transformers (grouped_mm experts, sdpa, its own router and norms, full
checkpointing, no balance loss, the optimizer after the backward pass), `grouped_mm` is ours with
transformers' experts. All of them share the trainer, the data, the dtype, the optimizer and the
cross entropy in chunks of labelled positions; with sdpa the rows are a batch (R, L).

    python bench/step.py --model demo --breakdown
    python bench/step.py --model 30b --layers 4 --max_length 4096 --batch 4 --dtype autocast --peer

A file is written after each row, so that a run that is cut off keeps what it has; a row that fails
is in it with its error. Peak memory on a CPU is that of the process since its start.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from parts.result_file import provenance, write
from parts.step.breakdown import table
from parts.step.measure import attempt, resolve
from parts.step.options import ROWS, StepOptions, pick, row_options
from transformers import HfArgumentParser

from qwen3_sft.errors import UsageError
from qwen3_sft.logs import set_up_logging


def parser(description: str | None, **defaults: Any) -> HfArgumentParser:
    """Return a parser of `StepOptions` with other defaults where given."""
    made = HfArgumentParser(
        StepOptions,  # type: ignore[bad-argument-type]
        description=(description or "").splitlines()[0],
        allow_abbrev=False,
    )
    made.set_defaults(**defaults)
    return made


def report(rows: dict[str, StepOptions]) -> Iterator[dict[str, Any]]:
    """Measure row after row; yield the report so far after each."""
    result: dict[str, Any] = {"benchmark": "step", **provenance(), "results": []}
    for name, options in rows.items():
        result["results"].append({"name": name, **attempt(options)})
        yield result


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the JSON and write it where `--out` says."""
    made = parser(__doc__)
    made.add_argument("--rows", nargs="+", choices=ROWS, default=["ours"])
    made.add_argument("--peer", action="store_true", help="adds the row transformers")
    made.add_argument("--compare", action="store_true", help="adds the row grouped_mm")
    made.add_argument("--out", type=Path)
    chosen = made.parse_args(argv)
    set_up_logging()
    added = [*["transformers"] * chosen.peer, *["grouped_mm"] * chosen.compare]
    names = dict.fromkeys([*chosen.rows, *added])
    try:
        rows = {name: row_options(pick(vars(chosen)), name) for name in names}
        for options in rows.values():
            resolve(options, Path("runs"))
    except UsageError as error:
        made.error(str(error))
    result: dict[str, Any] = {}
    for result in report(rows):
        if chosen.out:
            write(chosen.out, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    for row in result["results"]:
        if "breakdown" in row:
            print(f"\n{row['name']}:", *table(row["breakdown"]), sep="\n")
    if failed := [f"{row['name']}: {row['error']}" for row in result["results"] if "error" in row]:
        raise SystemExit(f"failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()

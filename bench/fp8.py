"""Whether FP8 pays on this device, half by half, and the table that `--fp8 auto` follows.

    python bench/fp8.py --model 30b --layers 6 --max_length 4096 --batch 4 --dtype autocast \
        --out bench/results/gpu/fp8.json --write qwen3_sft/model/fp8_measured.json

Three measurements of whole steps in one process: BF16, attention in FP8, experts in FP8. The first
and the last layer stay in BF16, so of 6 layers two thirds are converted: a ratio above 1 here is
larger at full depth. Only a CUDA device may enter the table; a CPU emulates FP8. Where the device
takes mxfp8 (sm_100 and later), the experts are measured with that scaling too, as `experts_mxfp8`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from parts.result_file import provenance, write
from parts.step.measure import attempt
from parts.step.options import StepOptions, pick
from step import parser

from qwen3_sft.hardware import find_device
from qwen3_sft.logs import set_up_logging
from qwen3_sft.model.fp8 import MXFP8_EXPERTS, device_problem

HALVES = ("off", "attention", "experts")


def racers(options: StepOptions, *, mxfp8: bool) -> dict[str, StepOptions]:
    """Return what is measured by its name in the table, BF16 as "off".

    Args:
        options: of each step.
        mxfp8: whether the device takes that scaling.
    """
    changes: dict[str, dict[str, Any]] = {half: {"fp8": half} for half in HALVES}
    if mxfp8:
        changes[MXFP8_EXPERTS] = {"fp8": "experts", "fp8_scaling": "mxfp8"}
    return {name: replace(options, breakdown=False, **one) for name, one in changes.items()}


def race(options: StepOptions) -> dict[str, Any]:
    """Return the rows by name, and the speed of each over BF16 where both were measured."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # A CPU only emulates the scales of mxfp8.
    is_cuda = device.type == "cuda"
    mxfp8 = is_cuda and device_problem(torch.cuda.get_device_capability(), "mxfp8") is None
    wanted = racers(options, mxfp8=mxfp8)
    rows = {name: attempt(one) for name, one in wanted.items()}
    speeds = {name: row.get("tokens_per_second") for name, row in rows.items()}
    ratios = {
        name: speed / speeds["off"]
        for name, speed in speeds.items()
        if name != "off" and speed and speeds["off"]
    }
    return {"benchmark": "fp8", **provenance(), "rows": rows, "over_bf16": ratios}


def entry(result: dict[str, Any], device: str, source: str) -> dict[str, Any]:
    """Return the row of the table for a device; what failed counts as no gain.

    Args:
        result: of `race`.
        device: the driver's name.
        source: the file that holds the result.

    Raises:
        SystemExit: the device has no name in qwen3_sft/hardware.py.
    """
    spec = find_device(device)
    if spec is None:
        raise SystemExit(f"{device} is not in qwen3_sft/hardware.py: no row can be written")
    names = [*HALVES[1:], *(name for name in result["rows"] if name not in HALVES)]
    ratios = {name: round(result["over_bf16"].get(name, 0.0), 3) for name in names}
    return {spec.name: {**ratios, "source": source}}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write the result and, with `--write`, the device's row of the table."""
    made = parser(__doc__)
    made.add_argument("--out", type=Path)
    made.add_argument("--write", type=Path, help="the table to put this device's row into")
    chosen = made.parse_args(argv)
    if chosen.write and not (chosen.out and torch.cuda.is_available()):
        made.error("--write needs --out and a CUDA device: a CPU emulates FP8")
    set_up_logging()
    result = race(pick(vars(chosen)))
    text = json.dumps(result, indent=1)
    print(text)
    if chosen.out:
        write(chosen.out, text + "\n")
    if chosen.write:
        if mark := result.get("mark"):
            raise SystemExit(f"--write {chosen.write}: no row of a result with a mark: {mark}")
        table = json.loads(chosen.write.read_text(encoding="utf-8"))
        table |= entry(result, torch.cuda.get_device_name(), str(chosen.out))
        write(chosen.write, json.dumps(table, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()

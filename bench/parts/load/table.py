"""The figures of `load.py` that are read, from those that were recorded."""

from __future__ import annotations

from typing import Any

GB = 1e9
BF16_BYTES = 2


def summary(rank: dict[str, Any], checkpoint: float) -> dict[str, float]:
    """Return the bytes of one process over all its phases, two ratios, and the seconds.

    Args:
        rank: what `worker.py` wrote.
        checkpoint: bytes of the model in bfloat16.
    """
    phases = list(rank["phases"].values())
    own, kept = max(phase["anonymous"] for phase in phases), rank["kept"]
    return {
        "own": own,
        "own_of_checkpoint": own / checkpoint,
        "own_of_kept": own / kept,
        "kept": kept,
        "left": phases[-1]["anonymous_after"] - kept,
        "mapped": max(phase["file"] for phase in phases),
        "seconds": sum(phase["seconds"] for phase in phases),
    }


def table(report: dict[str, Any]) -> str:
    """Return one line per process: GB, and `own` as a multiple of the checkpoint and of `kept`."""
    checkpoint = report["parameters"] * BF16_BYTES
    lines = [
        f"{report['device']}, {report['parameters'] / 1e6:.0f} million parameters, "
        f"{checkpoint / GB:.2f} GB in bfloat16; GB of each process:",
        f"{'':29}rank   own  x bf16  x kept   kept   left  mapped  seconds",
    ]
    for result in report["results"]:
        for rank in result["ranks"]:
            found = summary(rank, checkpoint)
            lines.append(
                f"{result['name']:29}{rank['rank']:4d}{found['own'] / GB:6.2f}"
                f"{found['own_of_checkpoint']:8.2f}{found['own_of_kept']:8.2f}"
                f"{found['kept'] / GB:7.2f}{found['left'] / GB:7.2f}{found['mapped'] / GB:8.2f}"
                f"{found['seconds']:9.1f}"
            )
    return "\n".join(lines)

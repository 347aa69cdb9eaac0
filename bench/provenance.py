"""What every result file carries, so that a figure can be traced and repeated."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from qwen3_sft.hardware import device_info
from qwen3_sft.run_folder import versions


def provenance() -> dict[str, Any]:
    """Return the device, the commit (`-dirty` with local changes) and the versions."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    described = subprocess.run(
        command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return {
        "device": device_info().name,
        "commit": described.stdout.strip() or "unknown",
        "versions": versions(),
    }

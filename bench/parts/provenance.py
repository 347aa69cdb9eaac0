"""What every result file carries, so that a figure can be traced and repeated."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from qwen3_sft.hardware import device_info
from qwen3_sft.records.run_folder import versions


def provenance() -> dict[str, Any]:
    """Return the device, the commit (`-dirty` if code differs from it) and the versions."""
    commit = _git("rev-parse", "--short", "HEAD") or "unknown"
    is_dirty = bool(_git("status", "--porcelain", "--", ":/", ":!/bench/results"))
    return {
        "device": device_info().name,
        "commit": f"{commit}-dirty" if is_dirty else commit,
        "versions": versions(),
    }


def _git(*words: str) -> str:
    command = ["git", *words]
    folder = Path(__file__).parent
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return done.stdout.strip()

"""Result files: what each carries so that a figure can be traced, and written in one step."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

MARK = "BENCH_MARK"


def provenance() -> dict[str, Any]:
    """Return the device, the commit (`-dirty` if code differs from it) and the versions.

    Where the environment variable BENCH_MARK says why a figure is not to be believed
    (`bench/gpu.sh` sets it), that is in the result as `mark`.
    """
    # For seconds, which no worker process that only imports this file is to spend.
    from qwen3_sft.hardware import device_info
    from qwen3_sft.records.run_folder import versions

    commit = _git("rev-parse", "--short", "HEAD") or "unknown"
    is_dirty = bool(_git("status", "--porcelain", "--", ":/", ":!/bench/results"))
    mark = os.environ.get(MARK)
    return {
        **({"mark": mark} if mark else {}),
        "device": device_info().name,
        "commit": f"{commit}-dirty" if is_dirty else commit,
        "versions": versions(),
    }


def write(path: Path, text: str) -> None:
    """Write `text` to `path`; folders that are missing are made.

    A run that is cut off leaves the last whole file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _git(*words: str) -> str:
    command = ["git", *words]
    folder = Path(__file__).parent
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return done.stdout.strip()

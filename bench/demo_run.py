"""The demo as a user runs it, from the command line to the export: what came of it, in one file.

    python bench/demo_run.py --out bench/results/gpu/demo_run.json
    python bench/demo_run.py --out /tmp/demo_run.json --max_steps 4    # the rest goes to the run

A run that fails is a result too: its exit code is in the file, and this command's own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from parts.result_file import provenance, write

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "config" / "recipe" / "demo.yaml"


def run(options: Sequence[str], folder: Path) -> dict[str, Any]:
    """Return exit code and seconds of the run, its summary (None without one) and its last step."""
    command = [sys.executable, "-m", "qwen3_sft.cli", "train", "--config", RECIPE]
    began = time.monotonic()
    done = subprocess.run([*command, "--output_dir", folder, *options], cwd=ROOT, check=False)
    found: dict[str, Any] = {
        "options": list(options), "exit_code": done.returncode,
        "seconds": time.monotonic() - began, "summary": None, "last_step": None,
    }  # fmt: skip
    summary, steps = folder / "summary.json", folder / "metrics.jsonl"
    if summary.is_file():
        found["summary"] = json.loads(summary.read_text(encoding="utf-8"))
    if steps.is_file():
        found["last_step"] = json.loads(steps.read_text(encoding="utf-8").splitlines()[-1])
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Run the demo and write the file; end with its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True)
    chosen, options = parser.parse_known_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        result = {"benchmark": "demo_run", **provenance(), **run(options, Path(folder) / "demo")}
    write(chosen.out, json.dumps(result, indent=1) + "\n")
    sys.exit(result["exit_code"])


if __name__ == "__main__":
    main()

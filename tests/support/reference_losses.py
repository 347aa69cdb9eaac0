"""Losses that a change of code must not change: 100 steps of the demo, bit by bit.

    python -m tests.support.reference_losses [IMPLEMENTATION ...]           1: not equal
    python -m tests.support.reference_losses --write [IMPLEMENTATION ...]   regenerate, say how

The recipe is config/recipe/demo.yaml with rows of 256 tokens and without evaluation, one file for
each implementation of the experts: they sum in different orders. Only instructions that every
x86-64 CPU has are used (`ENVIRONMENT`), or the bits would be those of one machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "reference_losses"
RECIPE = Path(__file__).parents[2] / "config" / "recipe" / "demo.yaml"
IMPLEMENTATIONS = ("scatter_moe", "scatter_moe_recompute", "grouped_mm", "eager", "batched_mm")
STEPS = 100
ENVIRONMENT = {
    "ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41",
    "OMP_NUM_THREADS": "1",
}  # fmt: skip


def main(argv: list[str]) -> int:
    """Compare or write; return the exit code."""
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        # Libraries read these when they are loaded.
        command = [sys.executable, "-m", "tests.support.reference_losses", *argv]
        os.execve(sys.executable, command, {**os.environ, **ENVIRONMENT})
    parser = argparse.ArgumentParser(prog="python -m tests.support.reference_losses")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("implementations", nargs="*")
    own = parser.parse_args(argv)
    differing = 0
    for name in own.implementations or IMPLEMENTATIONS:
        file = FOLDER / f"{name}.json"
        before = json.loads(file.read_text()) if file.exists() else None
        now = train(name)
        changes = compare(before, now)
        differing += bool(changes)
        print(f"{name}: {'; '.join(changes) or 'equal'}")
        if own.write and changes:
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps(now, indent=1) + "\n")
    return 0 if own.write else int(differing > 0)


def train(implementation: str) -> dict[str, Any]:
    """Run the recipe; return losses and gradient norms of all steps, and the weights' hash."""
    import torch
    import transformers
    import xxhash
    from safetensors.torch import load_file

    from qwen3_sft.run import run_command

    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        words = (
            "--config", RECIPE, "--output_dir", run, "--data_cache_dir", Path(folder) / "cache",
            "--max_length", 256, "--max_steps", STEPS, "--logging_steps", 1, "--eval_fraction", 0,
            "--eval_strategy", "no", "--save_strategy", "no", "--use_cpu", "true",
            "--experts_implementation", implementation,
        )  # fmt: skip
        if code := run_command([str(word) for word in words]):
            raise SystemExit(f"{implementation}: the run ended with exit code {code}")
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        weights = xxhash.xxh3_128()
        for name, tensor in sorted(load_file(run / "model" / "model.safetensors").items()):
            weights.update(name.encode())
            weights.update(tensor.numpy().tobytes())
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "weights_xxh3": weights.hexdigest(),
        "losses": [record["loss"] for record in records],
        "grad_norms": [record["grad_norm"] for record in records],
    }


def compare(before: dict[str, Any] | None, now: dict[str, Any]) -> list[str]:
    """Return what differs, in words; nothing if all is equal to the last bit."""
    if before is None:
        return ["new"]
    found = []
    for key in ("losses", "grad_norms"):
        pairs = list(zip(before[key], now[key], strict=True))
        steps = [step for step, (a, b) in enumerate(pairs, start=1) if a != b]
        if steps:
            most = max(abs(a - b) / abs(a) for a, b in pairs)
            found.append(
                f"{len(steps)} of {len(pairs)} {key} differ, the first at step {steps[0]}, by up "
                f"to {most:.1e} of their value"
            )
    if before["weights_xxh3"] != now["weights_xxh3"]:
        found.append("the final weights differ")
    facts = ("torch", "transformers", "cpu")
    other = [f"{key} {before[key]} -> {now[key]}" for key in facts if before[key] != now[key]]
    return [*found, *other] if found else []


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

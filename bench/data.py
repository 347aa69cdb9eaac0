"""Preparing data: ours, TRL's, and nothing but the encoding by `tokenizers`, in turn on one file.

    PYTHONPATH=. python bench/data.py                        10,000 rows, three rounds
    PYTHONPATH=. python bench/data.py --rows 200000 --repeats 1 --only ours_1 ours_2

Generated conversations of several turns (`parts/data/conversations.py`), Qwen3's vocabulary and the
template of its hybrid models, whose rows become several samples with us and one elsewhere. Each
measurement has a process of its own (`parts/data/measure.py`); rounds are interleaved, so that what
else the machine does meets all alike, and CPU seconds stand beside wall seconds. `bare` encodes the
texts as they are rendered, which is not in its time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from parts.data.conversations import frequent_words, write_conversations
from parts.data.measure import KINDS
from parts.result_file import provenance, write

MEASURE = Path(__file__).parent / "parts" / "data" / "measure.py"
_MEDIANS = ("seconds", "cpu_seconds", "peak_mib", "grown_mib", "again_seconds")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table and write the result file after every round."""
    options = _options(arguments)
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or Path(folder)
        if options.model is None:
            from tests.support.real_tokenizer import write_real_tokenizer

            write_real_tokenizer(model)
        spec = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
        file = Path(folder) / "conversations.jsonl"
        write_conversations(file, options.rows, frequent_words(spec["model"]["vocab"]))
        results: dict[str, list[dict[str, Any]]] = {kind: [] for kind in options.only}
        for _ in range(options.repeats):
            for kind in options.only:
                results[kind].append(_measured(kind, file, model))
                print(kind, results[kind][-1], flush=True)
            report = {
                "benchmark": "data",
                **provenance(),
                "rows": options.rows,
                "bytes": file.stat().st_size,
                "medians": {kind: _medians(found) for kind, found in results.items()},
                "results": results,
            }
            write(options.out, json.dumps(report, indent=1) + "\n")
    print(table(report))


def _measured(kind: str, file: Path, model: Path) -> dict[str, Any]:
    command = [sys.executable, str(MEASURE), kind, str(file), str(model)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{kind} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _medians(found: list[dict[str, Any]]) -> dict[str, float]:
    return {name: median(r[name] for r in found) for name in _MEDIANS if name in found[0]}


def table(report: dict[str, Any]) -> str:
    """Return the medians as a table in Markdown."""
    lines = [
        "| what | s | CPU s | peak MiB | grown MiB | second start s |",
        "|---|---|---|---|---|---|",
    ]
    for kind, found in report["medians"].items():
        cells = [str(found.get(name, "")) for name in _MEDIANS]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--model", type=Path, help="folder of a tokenizer (default: Qwen3's)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "data.json")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()

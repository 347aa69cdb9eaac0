"""Time and fill of index packing for a million documents: `python bench/pack.py [--count N]`.

Lengths are drawn from a log-normal distribution (median 270 tokens), cut to 8..max_length. The
result is checked before it is reported: no row may hold more than max_length tokens.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
from parts.result_file import provenance

from qwen3_sft.packing.rows import pack


def measure(count: int, max_length: int) -> dict[str, float | int]:
    """Pack `count` documents; return time and fill."""
    lengths = np.random.default_rng(0).lognormal(5.6, 0.9, count)
    lengths = np.clip(lengths, 8, max_length).astype(np.int64)
    start = time.perf_counter()
    bins, num_bins = pack(lengths, max_length)
    seconds = time.perf_counter() - start
    if np.bincount(bins, lengths, minlength=num_bins).max() > max_length:
        raise SystemExit("a row is over-full; no time is reported")
    return {
        "documents": count,
        "max_length": max_length,
        "rows": num_bins,
        "fill": float(lengths.sum() / (num_bins * max_length)),
        "seconds": seconds,
        "documents_per_second": count / seconds,
    }


def main() -> None:
    """Measure row lengths from 4k to 128k and write `bench/results/pack.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1_000_000)
    count = parser.parse_args().count
    results = [measure(count, max_length) for max_length in (4096, 32_768, 131_072)]
    for result in results:
        print(
            f"{result['documents']:,} documents, rows of {result['max_length']:,}: "
            f"{result['seconds']:.2f} s, fill {result['fill']:.4%}"
        )
    report = {
        "benchmark": "pack",
        **provenance(),
        "numpy": np.__version__,
        "lengths": "lognormal(5.6, 0.9), seed 0, cut to 8..max_length",
        "results": results,
    }
    target = Path(__file__).parent / "results" / "pack.json"
    target.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""What hashing costs a save: `python bench/checkpoint.py --folder DISK`, about ten minutes.

A random Qwen3-MoE in float32 and the two states of AdamW are written as a one-process run writes
them, flushed to disk and entered in a manifest, in three ways:

    none      without a hash: what the disk takes
    writing   hashed while they are written (`qwen3_sft/checkpoints/ledger.py`), as a run does
    after     written without, then read again and hashed, `cold` with the page cache dropped before
              (a checkpoint larger than the memory that is left), `warm` with the files still in it

Runs take turns; told are medians, and the least, since on a shared machine the others only add.
`user` is this process's own CPU time, which they hardly change. Every run begins with a dropped
page cache (that needs root) and ends with files that are flushed. `hash alone` is xxh3 on memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from parts.random_checkpoint import SIZES, config_of
from parts.result_file import provenance, write
from transformers import AutoModelForCausalLM

from qwen3_sft.checkpoints.hub_writer import write_hub_model
from qwen3_sft.checkpoints.ledger import Ledger, hash_file
from qwen3_sft.checkpoints.manifest import seal

RESULT = Path(__file__).parent / "results" / "checkpoint.json"
WAYS = ("none", "writing", "after, warm", "after, cold")
_DROP_CACHES = Path("/proc/sys/vm/drop_caches")


class NoHash:
    """Stands in for xxhash's digest where nothing is to be hashed."""

    def update(self, block: Any) -> None:
        """Hash nothing."""

    def hexdigest(self) -> str:
        """Return nothing."""
        return ""


def drop_caches() -> None:
    """Have the kernel forget all file pages that are on disk.

    Raises:
        PermissionError: not root.
    """
    os.sync()
    _DROP_CACHES.write_text("1")


def save(model: Any, optimizer: Any, folder: Path, way: str) -> dict[str, float]:
    """Write one checkpoint.

    Returns:
        Seconds until the files are on disk, and until the manifest is; own CPU seconds.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    drop_caches()
    start, user = time.perf_counter(), os.times().user
    ledger = Ledger(folder)
    library: Any = xxhash
    digest = library.xxh3_128
    if way != "writing":
        library.xxh3_128 = NoHash
    try:
        write_hub_model(model, folder, ledger=ledger)
        with ledger.open(folder / "optimizer.pt") as stream:
            file: Any = stream
            torch.save(optimizer.state_dict(), file)
    finally:
        library.xxh3_128 = digest
    if ledger.error is not None:
        raise ledger.error
    written = time.perf_counter()
    dropping = 0.0
    if way == "after, cold":
        drop_caches()
        dropping = time.perf_counter() - written
    if way.startswith("after"):
        for name, entry in ledger.entries.items():
            entry["xxh3"] = hash_file(folder / name)
    seal(folder, ledger.entries)
    return {
        "written_s": written - start,
        "sealed_s": time.perf_counter() - start - dropping,
        "user_s": os.times().user - user,
    }


def hash_alone(gigabytes: float = 0.5) -> float:
    """Return MB/s of xxh3 on memory."""
    block = os.urandom(1 << 20) * int(gigabytes * 1e9 / (1 << 20))  # zeros would share one page
    xxhash.xxh3_128(block).digest()
    start = time.perf_counter()
    xxhash.xxh3_128(block).digest()
    return len(block) / 1e6 / (time.perf_counter() - start)


def make(size: str) -> tuple[Any, Any]:
    """Return a random model and its optimizer after one step."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(size), dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model, optimizer


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="on the disk to measure")
    parser.add_argument("--size", choices=SIZES, default="1gb")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    model, optimizer = make(options.size)
    folder = options.folder / "bench_checkpoint"
    seconds: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    try:
        save(model, optimizer, folder, "none")  # the first touches what later ones find
        num_bytes = sum(path.stat().st_size for path in folder.iterdir())
        for _ in range(options.runs):
            for way in WAYS:
                seconds[way].append(save(model, optimizer, folder, way))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    results = {}
    for way, runs in seconds.items():
        median = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        least = {f"least_{key}": min(run[key] for run in runs) for key in runs[0]}
        speed = num_bytes / 1e6 / median["sealed_s"]
        results[way] = {**median, **least, "mb_per_s": speed, "runs": runs}
        print(
            f"{way:12} {median['sealed_s']:7.2f} s {speed:6.0f} MB/s, least "
            f"{least['least_sealed_s']:7.2f} s, user {median['user_s']:5.2f} s"
        )
    report = {
        "benchmark": "checkpoint",
        **provenance(),
        "size": options.size,
        "bytes": num_bytes,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "hash_alone_mb_per_s": hash_alone(),
        "results": results,
    }
    print(f"hash alone {report['hash_alone_mb_per_s']:.0f} MB/s")
    write(options.out, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

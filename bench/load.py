"""Memory of each process while a checkpoint is loaded: `python bench/load.py`, two minutes.

A random Qwen3-MoE of 1.08 GB in bfloat16 (`parts/load/checkpoint.py`) is loaded by every engine in
two gloo processes on this CPU, each in the order of a run (`parts/load/worker.py`), weights in
float32 as under autocast. Against the time before loading, per process:

    own     anonymous memory at the worst moment, sampled every 2 ms
    kept    the weights it trains afterwards, its shard or all of them
    left    anonymous memory at the end beyond `kept`
    mapped  pages of the checkpoint's files in its address space: cache, which the kernel takes back

On a CPU the device's memory is host memory too. What carries over to a run on GPUs: everything of
`single`, `ddp` and of `fsdp` while loading, because they read to the host first; of `native` only
`mapped`, because it reads each slice straight to the device, where `own` is needed then; of `zero3`
`mapped` and what rank 0 needs beyond the others (experts are fused there), because tensors are
gathered on the device. ZeRO-3 stops at the loaded model: DeepSpeed's own start, for which
`qwen3_sft/plan/weights.py` has a row, takes master weights and optimizer along. `as found` is
without what `qwen3_sft/model/loading.py` does about host memory.
"""

from __future__ import annotations

import argparse
import json
import socket
import tempfile
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from parts.load.checkpoint import SIZES, config_of, make_checkpoint
from parts.load.launch import LAUNCHES
from parts.load.table import BF16_BYTES, summary, table
from parts.load.worker import Job, work
from parts.provenance import provenance
from parts.result_file import write

from qwen3_sft.model.meta_model import model_on_meta

AS_FOUND = " as found"
NAMES = (*LAUNCHES, f"native fsdp 2{AS_FOUND}", f"fsdp{AS_FOUND}")
TIMEOUT_S = 180
RESULT = Path(__file__).parent / "results" / "load_memory_cpu.json"


def measure(job: Job) -> list[dict[str, Any]]:
    """Load in as many processes as the engine takes; return what each of them found.

    Raises:
        SystemExit: one of them failed or took too long; its output is printed.
    """
    ranks = range(job.launch.processes)
    # Forked: imports are done, and what they hold is the same for all.
    processes = [get_context("fork").Process(target=work, args=(job, rank)) for rank in ranks]
    for process in processes:
        process.start()
    try:
        for rank, process in zip(ranks, processes, strict=True):
            process.join(TIMEOUT_S)
            if process.exitcode:
                log = job.out(rank).with_suffix(".log").read_text(errors="replace")
                raise SystemExit(f"{job.engine}, rank {rank}: {process.exitcode}\n{log[-4000:]}")
            if process.exitcode is None:
                raise SystemExit(f"{job.engine}, rank {rank}: not done in {TIMEOUT_S} s")
    finally:
        for process in processes:
            process.kill()
    return [json.loads(job.out(rank).read_text(encoding="utf-8")) for rank in ranks]


def make_in_another_process(folder: Path, size: str) -> None:
    """Write the checkpoint without leaving traces of that in this process's heap."""
    process = get_context("fork").Process(target=make_checkpoint, args=(folder, size))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{folder}: no checkpoint could be written, code {process.exitcode}")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all engines, print the table and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=NAMES, choices=NAMES, metavar="ENGINE")
    parser.add_argument("--size", choices=SIZES, default="1gb")
    parser.add_argument("--folder", type=Path, help="for checkpoints; reused, default: temporary")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    model = model_on_meta(config_of(options.size))
    elements = [parameter.numel() for parameter in model.parameters()]
    report: dict[str, Any] = {
        "benchmark": "load",
        **provenance(),
        "size": options.size,
        "config": SIZES[options.size],
        "parameters": sum(elements),
        "largest_tensor": max(elements),
        "results": [],
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        make_in_another_process(folder, options.size)
        for name in options.only:
            engine, is_as_found = name.removesuffix(AS_FOUND), name.endswith(AS_FOUND)
            job = Job(engine, is_as_found, folder / options.size, Path(temporary), _free_port())
            ranks = [
                {**rank, "summary": summary(rank, BF16_BYTES * sum(elements))}
                for rank in measure(job)
            ]
            report["results"].append({"name": name, "ranks": ranks})
            print(f"{name}: done", flush=True)
    write(options.out, json.dumps(report, indent=1) + "\n")
    print(table(report))


if __name__ == "__main__":
    main()

"""Host memory of each process while a checkpoint is loaded, in the order of a run.

    python bench/load.py                                        one process
    torchrun --nproc_per_node 2 bench/load.py                   DDP
    torchrun --nproc_per_node 2 bench/load.py --fsdp_size 2     native FSDP2, also with --ep_size 2

A random Qwen3-MoE of 1.08 GB in bfloat16 (`parts/random_checkpoint.py`) is loaded in float32;
options of `qwen3-sft train` may follow. Against the time before loading, bytes of each process:

    own     anonymous memory at the worst moment, sampled every 2 ms
    kept    the weights it trains afterwards, its shard or all of them
    left    anonymous memory at the end beyond `kept`
    mapped  pages of the checkpoint's files in its address space: cache, which the kernel takes back

On a CPU the device's memory is host memory too; on GPUs native loading needs `own` there instead.
`results/load_memory_cpu.json` holds every engine, ZeRO-3 and accelerate's FSDP included, and both
with glibc's and accelerate's defaults (`as found`); a larger script measured it at commit 0267167.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
import threading
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from parts.random_checkpoint import SIZES, make_checkpoint
from parts.result_file import provenance
from torch.distributed.tensor import DTensor

import monkey_patch
from qwen3_sft.decisions import Machine, decide
from qwen3_sft.distributed.process_group import join_process_group, leave_process_group
from qwen3_sft.model.loading import load_model
from qwen3_sft.model.meta_model import meta_model
from qwen3_sft.options.recipe import parse_options
from qwen3_sft.training.arguments import final_arguments

INTERVAL_S = 0.002
STATUS = Path("/proc/self/status")


class HostMemory:
    """Sample this process's memory inside a `with`, in a thread.

    Attributes:
        own: bytes of anonymous and shared memory on top of what there was, at the worst moment.
        mapped: the same of mapped files' pages, whose worst moment may be another.
        own_after: likewise at the end.
    """

    def __enter__(self) -> Self:
        """Begin."""
        self._start = _resident()
        self.own = self.mapped = self.own_after = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop, and read what is left."""
        self._done.set()
        self._thread.join()
        self._look()

    def _sample(self) -> None:
        while not self._done.wait(INTERVAL_S):
            self._look()

    def _look(self) -> None:
        own, mapped = (now - start for now, start in zip(_resident(), self._start, strict=True))
        self.own, self.mapped, self.own_after = max(self.own, own), max(self.mapped, mapped), own


def _resident() -> tuple[int, int]:
    lines = STATUS.read_text(encoding="ascii").splitlines()
    fields = dict(line.split(":", 1) for line in lines if line.startswith("Rss"))
    kib = {name: int(text.split()[0]) for name, text in fields.items()}
    return 1024 * (kib["RssAnon"] + kib["RssShmem"]), 1024 * kib["RssFile"]


def measure(checkpoint: Path, words: Sequence[str]) -> dict[str, Any]:
    """Load as a run with these options would; return bytes of this process."""
    options = parse_options(
        ["--model_name_or_path", str(checkpoint), "--output_dir", f"{checkpoint}_run",
         "--dataset", "none.jsonl", "--max_steps", "1", "--save_strategy", "no", *words]
    )  # fmt: skip
    decisions = decide(options, meta_model(str(checkpoint)), Machine.here(options.train))
    options, engine = decisions.options, decisions.engine
    join_process_group(options.train.dist_timeout_s, options.train.ddp_backend)
    args = final_arguments(options, engine)
    torch.zeros(1, device=args.device)  # a device's context is no part of loading
    if dist.is_initialized():
        dist.barrier()
    with HostMemory() as memory:
        model: Any = load_model(
            checkpoint, options.model, args.device, decisions.weights, decisions.attention_name,
            engine=engine, compute=decisions.compute,
        )  # fmt: skip
        monkey_patch.apply_patches(model, decisions.patches)
        if engine.layout == "whole":
            model.to(args.device)
        gc.collect()
    leave_process_group()
    local = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    kept = sum(t.numel() * t.element_size() for t in local)
    return {
        "engine": str(engine), "rank": args.process_index, "own": memory.own, "kept": kept,
        "left": memory.own_after - kept, "mapped": memory.mapped, "own_of_kept": memory.own / kept,
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Make the checkpoint unless it is there, measure this process and print a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--size", choices=SIZES, default="1gb")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir(), "bench_load"))
    options, words = parser.parse_known_args(argv)
    is_alone = os.environ.get("WORLD_SIZE", "1") == "1"
    if not torch.cuda.is_available():
        words += ["--use_cpu", "true", *([] if is_alone else ["--ddp_backend", "gloo"])]
    if os.environ.get("RANK", "0") == "0":  # the others meet it where the group is made
        # In a process of its own, which leaves no traces in this one's heap.
        making = options.folder, options.size
        maker = get_context("fork").Process(target=make_checkpoint, args=making)
        maker.start()
        maker.join()
    print(json.dumps(measure(options.folder / options.size, words) | provenance()), flush=True)


if __name__ == "__main__":
    main()

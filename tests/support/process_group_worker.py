"""Started by torchrun: what timeout do the groups have that others create? Prints JSON."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh

from qwen3_sft.distributed.process_group import join_process_group, leave_process_group
from qwen3_sft.options.train_args import TrainArguments

TIMEOUT_S = 3.0


def timeout_of(group: dist.ProcessGroup) -> float:
    return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()


def main() -> None:
    join_process_group(TIMEOUT_S)
    ours = dist.group.WORLD
    assert ours is not None
    # Both would create a group of their own; --dist_timeout_s 99 must not matter now.
    TrainArguments(output_dir=sys.argv[1], use_cpu=True, ddp_backend="gloo", dist_timeout_s=99)
    Accelerator(cpu=True)
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    found = {
        "kept": dist.group.WORLD is ours,
        "timeouts": [
            timeout_of(group)
            for group in (ours, mesh["replicate"].get_group(), mesh["shard"].get_group(),
                          dist.new_group([0, 1]))
        ],
    }  # fmt: skip
    group = dist.new_group([0, 1])
    if dist.get_rank() == 0:
        start = time.monotonic()
        try:
            dist.barrier(group)
        except RuntimeError as error:
            found["error"] = str(error)
        found["waited_s"] = time.monotonic() - start
    else:
        time.sleep(2 * TIMEOUT_S)  # lost, as far as rank 0 can tell
    start = time.monotonic()
    leave_process_group()
    found |= {"left_after_s": time.monotonic() - start, "initialized": dist.is_initialized()}
    Path(sys.argv[1], f"rank{os.environ['RANK']}.json").write_text(
        json.dumps(found), encoding="utf-8"
    )


if __name__ == "__main__":
    main()

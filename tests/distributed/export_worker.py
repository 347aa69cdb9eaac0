"""One of the processes of `test_export_sharded.py`: exports one checkpoint from every engine.

`main(BASE, OUT)` writes `OUT/CASE` and, for every rank, `OUT/CASE.RANK.json` with the error and
what the case wants to be known.
"""

from __future__ import annotations

import json
import os
import resource
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig

from qwen3_sft import export, rank_zero
from qwen3_sft.export_check import ExportError

BASE, OUT = Path(), Path()


def load(**sizes: int) -> PreTrainedModel:
    config = {"distributed_config": DistributedConfig(**sizes)} if sizes else {}
    return AutoModelForCausalLM.from_pretrained(BASE, **config)


def sharded() -> PreTrainedModel:
    model = load()
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def record(case: str, **facts: Any) -> None:
    (OUT / f"{case}.{dist.get_rank()}.json").write_text(json.dumps(facts))


def attempt(case: str, model: Any, **options: Any) -> None:
    """Export, and record what this rank was told."""
    parameter = model.get_parameter("model.layers.0.mlp.experts.gate_up_proj")
    placements = str(getattr(parameter, "placements", None))
    error = None
    try:
        export.export_model(model, BASE, OUT / case, **options)
    except ExportError as raised:
        error = str(raised)
    record(case, error=error, placements=placements, numel=parameter.numel())


def engines() -> None:
    attempt("fsdp4_ep2", load(fsdp_size=4, ep_size=2))
    attempt("hsdp_ep2", load(fsdp_size=2, dp_replicate_size=2, ep_size=2))
    attempt("fully_shard", sharded(), max_shard_bytes=1_000_000)


def failures() -> None:
    """What goes wrong on rank 0 only, before anything is written and in the middle."""
    model = sharded()
    if dist.get_rank() == 0:
        (OUT / "a_file").touch()
    attempt("a_file", model)
    if dist.get_rank() == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    attempt("disk", model, max_shard_bytes=200_000)
    if dist.get_rank() == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def zero3() -> None:
    import deepspeed

    # DeepSpeed's shared-memory collectives would be compiled for minutes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    model = load()
    with deepspeed.zero.Init(module=model, config_dict_or_path=config):
        pass
    engine, *_ = deepspeed.initialize(model=model, config=config)
    attempt("zero3", engine.module)


def long_check() -> None:
    """Rank 0 gives signs of life while it checks; count those that arrive."""
    broadcast, signs = rank_zero._broadcast, []

    def counting(message: list[Any]) -> list[Any]:
        message = broadcast(message)
        signs.append(not message[0])
        return message

    rank_zero._broadcast = counting
    export._SIGN_OF_LIFE_S = 0.5
    export.is_deepspeed_zero3_enabled = lambda: True  # so that the check is a process, as on a GPU
    attempt("long_check", load())
    record("signs", number=sum(signs), agreements=len(signs) - sum(signs))


def main(base: Path, out: Path) -> None:
    global BASE, OUT
    BASE, OUT = base, out
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    engines()
    failures()
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        zero3()
    long_check()
    dist.barrier()

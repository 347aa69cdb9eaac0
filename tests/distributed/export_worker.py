"""One of the processes of `test_export_sharded.py`: exports one checkpoint from every engine.

`main(BASE, OUT)` writes `OUT/CASE` and, for every rank, `OUT/CASE.RANK.json` with the error and
what the case wants to be known.
"""

from __future__ import annotations

import json
import os
import resource
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig

from qwen3_sft.distributed import rank_zero
from qwen3_sft.errors import ExportError
from qwen3_sft.export import export


@dataclass(frozen=True)
class Exports:
    """The base model and the folder that all is written to."""

    base: Path
    out: Path

    def load(self, **sizes: int) -> PreTrainedModel:
        config = {"distributed_config": DistributedConfig(**sizes)} if sizes else {}
        return AutoModelForCausalLM.from_pretrained(self.base, **config)

    def sharded(self) -> PreTrainedModel:
        model = self.load()
        for layer in model.model.layers:
            fully_shard(layer)
        return fully_shard(model)

    def record(self, case: str, **facts: Any) -> None:
        (self.out / f"{case}.{dist.get_rank()}.json").write_text(json.dumps(facts))

    def attempt(self, case: str, model: Any, **options: Any) -> None:
        """Export, and record what this rank was told."""
        parameter = model.get_parameter("model.layers.0.mlp.experts.gate_up_proj")
        placements = str(getattr(parameter, "placements", None))
        error = None
        try:
            export.export_model(model, self.base, self.out / case, **options)
        except ExportError as raised:
            error = str(raised)
        self.record(case, error=error, placements=placements, numel=parameter.numel())

    def engines(self) -> None:
        self.attempt("fsdp4_ep2", self.load(fsdp_size=4, ep_size=2))
        self.attempt("hsdp_ep2", self.load(fsdp_size=2, dp_replicate_size=2, ep_size=2))
        self.attempt("fully_shard", self.sharded(), max_shard_bytes=1_000_000)

    def failures(self) -> None:
        """What goes wrong on rank 0 only, before anything is written and in the middle."""
        model = self.sharded()
        if dist.get_rank() == 0:
            (self.out / "a_file").touch()
        self.attempt("a_file", model)
        if dist.get_rank() == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        self.attempt("disk", model, max_shard_bytes=200_000)
        if dist.get_rank() == 0:
            resource.setrlimit(
                resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            )

    def zero3(self) -> None:
        import deepspeed

        # DeepSpeed's shared-memory collectives would be compiled for minutes.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed("gloo", verbose=False)
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        }
        model = self.load()
        with deepspeed.zero.Init(module=model, config_dict_or_path=config):
            pass
        engine, *_ = deepspeed.initialize(model=model, config=config)
        self.attempt("zero3", engine.module)

    def long_check(self) -> None:
        """Rank 0 gives signs of life while it checks; count those that arrive."""
        broadcast, signs = rank_zero._broadcast, []

        def counting(message: list[Any]) -> list[Any]:
            message = broadcast(message)
            signs.append(not message[0])
            return message

        rank_zero._broadcast = counting
        export._SIGN_OF_LIFE_S = 0.5
        # The check is a process then, as on a GPU.
        export.is_deepspeed_zero3_enabled = lambda: True
        self.attempt("long_check", self.load())
        self.record("signs", number=sum(signs), agreements=len(signs) - sum(signs))


def main(base: Path, out: Path) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    exports = Exports(base, out)
    exports.engines()
    exports.failures()
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        exports.zero3()
    exports.long_check()
    dist.barrier()

"""What a launcher and a GPU would tell the processes of each engine, for gloo on a CPU."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3_sft.launch.accelerate_environment import accelerate_environment

CONFIG = Path(__file__).resolve().parents[3] / "config"


@dataclass(frozen=True)
class Launch:
    """How one engine is started.

    Attributes:
        processes: of this host.
        config: the launch file in config/, None for a single process.
        flags: on the command line of `qwen3_sft.train`.
    """

    processes: int
    config: str | None
    flags: tuple[str, ...] = ()

    def argv(self, checkpoint: Path, output: Path) -> list[str]:
        """Return the command line of a run that loads `checkpoint`."""
        names = ("--model_name_or_path", str(checkpoint), "--output_dir", str(output))
        # Accelerate drops DeepSpeed and FSDP when it is told of a CPU; gloo has to do.
        device = ("--ddp_backend", "gloo") if self.config else ("--use_cpu", "true")
        rest = ("--dataset", "none.jsonl", "--max_steps", "1", "--save_strategy", "no")
        return [*names, *rest, *device, *self.flags]

    def enter(self) -> None:
        """Make this process, which has its rank already, one of such a launch, once."""
        if self.config is None:
            return
        environment = accelerate_environment(str(CONFIG / f"{self.config}.json"), self.processes)
        os.environ.update(environment)
        if self.config.startswith("zero"):
            os.environ["DS_ACCELERATOR"] = "cpu"
            _do_not_compile()
        else:
            os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
            _let_accelerate_shard_on_a_cpu()


LAUNCHES: dict[str, Launch] = {
    "single": Launch(1, None),
    "ddp": Launch(2, "ddp"),
    "native fsdp 2": Launch(2, "ddp", ("--fsdp_size", "2")),
    "native fsdp 2 x ep 2": Launch(2, "ddp", ("--fsdp_size", "2", "--ep_size", "2")),
    "fsdp": Launch(2, "fsdp"),
    "zero3": Launch(2, "zero3"),
}


def _let_accelerate_shard_on_a_cpu() -> None:
    """Accelerate switches to FSDP from MULTI_GPU only; call a gloo world that."""
    from accelerate.state import DistributedType, PartialState

    def prepare(self: Any, cpu: bool = False, sagemaker_dp: bool = False, backend: Any = None):
        return "gloo", DistributedType.MULTI_GPU

    PartialState._prepare_backend = prepare


def _do_not_compile() -> None:
    """DeepSpeed would compile its shared-memory collectives for minutes; gloo does without."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

"""Run many whole training runs in one tree of processes, because imports cost more than the runs.

A case is {"name", "port", "launch", "environment", "notes", "argv"}: `launch` names a file of
config/ or is None, `environment` is added to what it sets, `notes` is where each rank writes what
it saw of the experts. It is what `accelerate launch --config_file config/LAUNCH.json -m
qwen3_sft.train ARGV` would run, on the CPU.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from qwen3_sft.export import export
from qwen3_sft.launch.accelerate_environment import accelerate_environment
from qwen3_sft.logs import set_up_logging
from tests.distributed.exact_norm import sum_in_float64
from tests.distributed.observe import watched_experts
from tests.support.faults import Blow

CONFIG = Path(__file__).resolve().parents[2] / "config"
# In a case's environment: its process checks what ZeRO-3 exports. test_export_sharded.py does not.
CHECKED_HERE = {"TEST_CHECKED_HERE": "1"}


def main(cases: list[dict[str, Any]], folder: Path) -> int:
    """Run the cases one after another; the exit code of each goes to `codes.json` in the folder."""
    prepare()
    codes = {}
    for case in cases:
        logging.getLogger("qwen3_sft").info("=== %s", case["name"])
        codes[case["name"]] = run_case(case)
        _forget()
        if os.environ.get("RANK", "0") == "0":
            (folder / "codes.json").write_text(json.dumps(codes))
    return 0


def run_and_fall(case: dict[str, Any], rank: int, blow: Blow, operations: Path) -> int:
    """Run one case, in which one rank deals itself a blow."""
    prepare()
    if os.environ["RANK"] == str(rank):
        blow.arm(operations)
    return run_case(case)


def run_case(case: dict[str, Any]) -> int:
    """Return the exit code of one case."""
    from qwen3_sft.run import run_command

    with _environment(case), watched_experts(Path(case["notes"])):
        return run_command([*case["argv"], *_device(case["launch"])])


def prepare() -> None:
    """Let CPUs do what the engines do on GPUs."""
    set_up_logging()
    sum_in_float64()
    _let_accelerate_shard_on_a_cpu()
    _let_exports_be_checked_here()


@contextmanager
def _environment(case: dict[str, Any]) -> Iterator[None]:
    """Set what the launcher would, for the time of one case."""
    launch, before = case["launch"], dict(os.environ)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if launch is not None:
        os.environ |= accelerate_environment(str(CONFIG / f"{launch}.json"), world_size)
    # A port of its own: groups of the same name in one store would mix.
    os.environ |= {"MASTER_PORT": str(case["port"]), **case["environment"]}
    if _is_zero(launch):
        os.environ["DS_ACCELERATOR"] = "cpu"
        _do_not_compile()
    elif launch is not None:
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _device(launch: str | None) -> list[str]:
    """Accelerate drops DeepSpeed and FSDP when it is told of a CPU; gloo has to do."""
    on_cpu = ["--use_cpu", "true"] if launch is None else []
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return [*on_cpu, "--ddp_backend", "gloo"] if several else on_cpu


def _is_zero(launch: str | None) -> bool:
    return launch is not None and launch.startswith("zero")


def _let_accelerate_shard_on_a_cpu() -> None:
    """Accelerate switches to FSDP from MULTI_GPU only; call a gloo world that, for these tests."""
    from accelerate.state import DistributedType, PartialState

    original = PartialState._prepare_backend

    def prepare(self: Any, cpu: bool = False, sagemaker_dp: bool = False, backend: Any = None):
        if os.environ.get("ACCELERATE_TORCH_DEVICE") == "cpu":
            return "gloo", DistributedType.MULTI_GPU
        return original(self, cpu, sagemaker_dp, backend)

    PartialState._prepare_backend = prepare


def _let_exports_be_checked_here() -> None:
    """ZeRO-3 starts a process, ten seconds of imports; without its settings this one can do it."""
    from transformers.integrations import deepspeed

    original = export.verify

    def verify(folder: Path, expected: Any, *, is_isolated: bool, **options: Any) -> None:
        if not CHECKED_HERE.items() <= os.environ.items():
            original(folder, expected, is_isolated=is_isolated, **options)
            return
        settings = deepspeed._hf_deepspeed_config_weak_ref()
        deepspeed.unset_hf_deepspeed_config()
        try:
            original(folder, expected, is_isolated=False, **options)
        finally:
            deepspeed.set_hf_deepspeed_config(settings)

    export.verify = verify


def _do_not_compile() -> None:
    """DeepSpeed would compile its shared-memory collectives for minutes; gloo does without."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _forget() -> None:
    """Undo what one run leaves in module globals, as the end of a process would."""
    from accelerate.state import AcceleratorState, GradientState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    if dist.is_initialized():  # after a run that failed
        dist.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    unset_hf_deepspeed_config()
    if "deepspeed" in sys.modules:
        from deepspeed.comm import comm
        from deepspeed.utils import groups

        comm.cdb = groups._WORLD_GROUP = groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None

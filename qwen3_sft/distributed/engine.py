"""Which of the existing engines spreads a run over processes, and what does not go together.

Three are offered. `native` is transformers' own FSDP2 with expert parallelism (`DistributedConfig`,
launched like DDP and asked for with --fsdp_size), `fsdp` is accelerate's FSDP2, `zero2` and `zero3`
are DeepSpeed's. Accelerate says which through environment variables, so everything here can be
refused before weights are read or a process group exists.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qwen3_sft.errors import UsageError
from qwen3_sft.options.data_args import DataArguments
from qwen3_sft.options.model_args import ModelArguments

Kind = Literal["single", "ddp", "native", "fsdp", "zero2", "zero3"]
Layout = Literal["whole", "dtensor", "zero"]

_SWITCHES = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}


@dataclass(frozen=True)
class Engine:
    """How the processes of one run divide the work.

    Attributes:
        kind: the engine.
        fsdp_size: processes that hold one copy of the weights together (`native`).
        ep_size: processes that hold the experts of one layer together (`native`).
        dp_replicate_size: copies of the weights (`native`).
    """

    kind: Kind
    fsdp_size: int = 1
    ep_size: int = 1
    dp_replicate_size: int = 1

    @property
    def layout(self) -> Layout:
        """How weights and optimizer lie in memory, and so in a checkpoint."""
        if self.kind in ("native", "fsdp"):
            return "dtensor"
        return "zero" if self.kind in ("zero2", "zero3") else "whole"

    @property
    def shards_weights(self) -> bool:
        """Whether a process sees only its part of a weight outside of a forward pass."""
        return self.kind in ("native", "fsdp", "zero3")

    def __str__(self) -> str:
        """Return the words for the log."""
        if self.kind != "native":
            return self.kind
        sizes = f"fsdp_size {self.fsdp_size}, ep_size {self.ep_size}"
        return f"native ({sizes}, dp_replicate_size {self.dp_replicate_size})"


def detect(
    model: ModelArguments, data: DataArguments, environment: Mapping[str, str] | None = None
) -> Engine:
    """Return the engine that launcher and options ask for.

    Args:
        model: the sharding sizes.
        data: packing, which context parallelism excludes.
        environment: what accelerate's launcher sets; the process's own by default.

    Raises:
        UsageError: the combination is contradictory, useless or not supported.
    """
    env = os.environ if environment is None else environment
    world_size = int(env.get("WORLD_SIZE", "1"))
    switched_on = [name for key, name in _SWITCHES.items() if _is_true(env, key)]
    if len(switched_on) > 1:
        raise UsageError("FSDP and DeepSpeed are both switched on: launch with one config file")
    _refuse_parallelism(env, data)
    is_native = (model.fsdp_size, model.ep_size, model.dp_replicate_size) != (1, 1, 1)
    if is_native and switched_on:
        raise UsageError(
            f"--fsdp_size/--ep_size shard the model natively, and the launch file switches "
            f"{switched_on[0]} on as well: launch with config/ddp.json, or leave the sizes out"
        )
    if is_native:
        return _native(model, world_size)
    if "FSDP" in switched_on:
        return _fsdp(env, world_size)
    if switched_on:
        return Engine(_zero_stage(env))
    return Engine("ddp" if world_size > 1 else "single")


def check_experts(engine: Engine, num_experts: int) -> None:
    """Refuse an expert parallel size that does not divide the experts.

    Raises:
        UsageError: naming the sizes that do.
    """
    if num_experts % engine.ep_size:
        fits = [n for n in range(1, num_experts + 1) if num_experts % n == 0]
        raise UsageError(
            f"--ep_size {engine.ep_size} does not divide the model's {num_experts} experts; "
            f"choose one of {', '.join(map(str, fits))}"
        )


def _native(model: ModelArguments, world_size: int) -> Engine:
    replicas = model.dp_replicate_size
    fsdp_size = world_size // replicas if model.fsdp_size == -1 else model.fsdp_size
    sizes = f"--fsdp_size {model.fsdp_size} --dp_replicate_size {replicas}"
    for name, size in (("ep_size", model.ep_size), ("dp_replicate_size", replicas)):
        if size < 1:
            raise UsageError(f"--{name} {size}: must be at least 1")
    if fsdp_size < 1 or fsdp_size * replicas != world_size:
        raise UsageError(
            f"{sizes} needs {max(fsdp_size, 1) * replicas} processes, there are {world_size}; "
            "--fsdp_size -1 takes all that are there"
        )
    if fsdp_size == 1 and model.ep_size > 1:
        raise UsageError(f"--ep_size {model.ep_size} needs --fsdp_size of at least that size")
    if fsdp_size % model.ep_size:
        raise UsageError(f"--ep_size {model.ep_size} does not divide --fsdp_size {fsdp_size}")
    if fsdp_size == 1:  # one process, or nothing but copies
        return Engine("ddp" if world_size > 1 else "single")
    return Engine("native", fsdp_size, model.ep_size, replicas)


def _fsdp(env: Mapping[str, str], world_size: int) -> Engine:
    if env.get("FSDP_VERSION", "1") != "2":
        raise UsageError(
            f"fsdp_version {env.get('FSDP_VERSION', '1')} is not supported; config/fsdp.json uses 2"
        )
    if _is_true(env, "FSDP_ACTIVATION_CHECKPOINTING"):
        raise UsageError(
            "fsdp_activation_checkpointing would checkpoint outside of the Trainer's control; set "
            "it to false and use --activation_checkpointing full"
        )
    if world_size == 1:
        raise UsageError("FSDP over one process shards nothing; launch with config/single.json")
    return Engine("fsdp")


def _refuse_parallelism(env: Mapping[str, str], data: DataArguments) -> None:
    if not _is_true(env, "ACCELERATE_USE_PARALLELISM_CONFIG"):
        return
    for name in ("CP_SIZE", "SP_SIZE", "TP_SIZE"):
        size = env.get(f"PARALLELISM_CONFIG_{name}", "1")
        if size not in ("1", "None", ""):
            packed = "packing and " if data.packing and name != "TP_SIZE" else ""
            raise UsageError(
                f"{packed}parallelism_config_{name.lower()} {size} do not go together: sequences "
                "are not split over processes here; set it to 1"
            )


def _zero_stage(env: Mapping[str, str]) -> Kind:
    config = deepspeed_config(env)
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage not in (2, 3):
        raise UsageError(
            f"DeepSpeed ZeRO stage {stage} is not supported; use config/zero2.json or "
            "config/zero3.json, or config/ddp.json for no sharding at all"
        )
    return "zero2" if stage == 2 else "zero3"


def deepspeed_config(environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return DeepSpeed's configuration as the launcher named it.

    Raises:
        UsageError: no file is named, or it cannot be read.
    """
    env = os.environ if environment is None else environment
    name = env.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "")
    if name in ("", "None"):
        raise UsageError(
            "DeepSpeed without a deepspeed_config_file: launch with config/zero2.json or "
            "config/zero3.json, or name one in your accelerate config"
        )
    try:
        return json.loads(Path(name).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UsageError(f"deepspeed_config_file {name}: {error}") from error


def _is_true(env: Mapping[str, str], key: str) -> bool:
    return env.get(key, "false").lower() in ("1", "true", "yes")


def require_deepspeed() -> None:
    """Raise if DeepSpeed is not there.

    Raises:
        UsageError: naming what to install.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise UsageError("ZeRO needs DeepSpeed, which is not installed: pip install deepspeed")

"""What `accelerate launch --config_file F` tells the processes it starts, without starting any.

Accelerate's launcher cannot be told this node's address, which multi-node runs need, so torchrun
starts them instead. Its parser and its own helpers still turn the file into variables here, because
a copy of their rules would age.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Mapping

from qwen3_sft.errors import UsageError

# What it sets for config/single.json; a test holds this to it. Asking it takes seconds of imports,
# in which a run of one process could begin.
SINGLE_PROCESS = {
    "ACCELERATE_USE_CPU": "False",
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_DYNAMO_BACKEND": "NO",
    "ACCELERATE_DYNAMO_MODE": "default",
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False",
    "ACCELERATE_DYNAMO_USE_DYNAMIC": "False",
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "False",
}
_OTHER_AXES = ("TP_SIZE", "CP_SIZE", "SP_SIZE")
_PREFIX = "PARALLELISM_CONFIG_"


def single_process_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment as accelerate's launcher gives it to the process of config/single.json.

    Args:
        environment: of the launcher.
    """
    return {"OMP_NUM_THREADS": "1", **environment, **SINGLE_PROCESS}


def accelerate_environment(
    config_file: str, num_processes: int, num_machines: int = 1
) -> dict[str, str]:
    """Return the variables that accelerate's launcher would set or change for its processes.

    Args:
        config_file: an accelerate config, JSON or YAML.
        num_processes: on all machines together.
        num_machines: nodes. With more than one, a config with replicas and shards (HSDP) gets one
            replica per node, sharded over the node's processes, whatever sizes it names.

    Raises:
        UsageError: the file is missing, is not one of accelerate's, or starts a single process.
    """
    from accelerate.utils import check_cuda_p2p_ib_support, prepare_multi_gpu_env
    from accelerate.utils.launch import prepare_deepspeed_cmd_env

    args = _launch_arguments(config_file, num_processes, num_machines)
    try:
        if args.use_deepspeed:
            _, environment = prepare_deepspeed_cmd_env(args)
        elif args.use_fsdp or args.multi_gpu:
            environment = prepare_multi_gpu_env(args)
        else:
            raise UsageError(
                f"{config_file} starts one process without a group; for several processes use "
                "config/ddp.json, config/fsdp.json, config/zero2.json or config/zero3.json"
            )
    except (ValueError, RuntimeError) as error:
        raise error if isinstance(error, UsageError) else _unusable(config_file, error) from error
    if not check_cuda_p2p_ib_support():
        environment = {"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1"} | environment
    if num_machines > 1 and environment.get("ACCELERATE_USE_PARALLELISM_CONFIG") == "true":
        environment |= _one_replica_per_node(environment, num_processes, num_machines)
    return {k: v for k, v in environment.items() if os.environ.get(k) != v}


def _launch_arguments(config_file: str, num_processes: int, num_machines: int) -> Namespace:
    """Parse as `accelerate launch` would; addresses and ports are torchrun's, so any will do."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    words = ["--config_file", config_file, "--num_processes", str(num_processes)]
    words += ["--num_machines", str(num_machines), "--machine_rank", "0"]
    words += ["--main_process_ip", "127.0.0.1", "--main_process_port", "0"]
    words += ["-m", "qwen3_sft.train"]
    try:
        args, defaults, is_precision_from_file = _validate_launch_command(
            launch_command_parser().parse_args(words)
        )
    except (ValueError, OSError, KeyError) as error:
        raise _unusable(config_file, error) from error
    if args.use_deepspeed:  # accelerate's launch_command() does this between the two steps
        fields = [*vars(defaults)["deepspeed_config"]]
        fields += ["mixed_precision"] * is_precision_from_file
        args.deepspeed_fields_from_accelerate_config = ",".join(fields)
    return args


def _unusable(config_file: str, error: Exception) -> UsageError:
    return UsageError(f"ACCELERATE_CONFIG {config_file}: accelerate cannot use it: {error}")


def _one_replica_per_node(
    environment: dict[str, str], num_processes: int, num_machines: int
) -> dict[str, str]:
    if any(environment.get(_PREFIX + axis, "1") not in ("1", "None") for axis in _OTHER_AXES):
        return {}
    if environment.get(_PREFIX + "DP_REPLICATE_SIZE", "1") in ("1", "None"):
        return {}  # sharded over everything: no replicas asked for
    return {
        _PREFIX + "DP_REPLICATE_SIZE": str(num_machines),
        _PREFIX + "DP_SHARD_SIZE": str(num_processes // num_machines),
    }

"""The process group of a run, with one timeout for everything that is created from it.

Left alone, whoever needs a group first creates it with a timeout of its own: transformers' loading
waits 2 hours, torch 30 minutes on CPU, and subgroups of meshes 10 minutes on CUDA, whatever
--dist_timeout_s says (transformers 5.23, torch 2.13). So the group is created here, before any of
them looks, and torch's default for later groups is set to the same value.
"""

from __future__ import annotations

import os
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from qwen3_sft.errors import ProcessGroupError, UsageError

# Nodes prepare data and import at their own pace, which no timeout of a collective should count.
_JOIN_AT_LEAST_S = 600
# A failure that comes sooner is no waiting in vain.
_AT_ONCE_S = 0.5


def join_process_group(timeout_s: float, backend: str | None = None) -> dist.Store | None:
    """Create torch's default process group, if this process is one of several.

    Reads RANK, WORLD_SIZE and LOCAL_RANK, and MASTER_ADDR and MASTER_PORT, as torchrun sets them.
    On CUDA the process is bound to its device. Accelerate and DeepSpeed keep a group that exists.

    Args:
        timeout_s: longest wait of a collective in seconds, in every group of this process. Waiting
            here for all processes to arrive may take `_JOIN_AT_LEAST_S` even if this is shorter.
        backend: `gloo`, `nccl`, or as torch takes it; by default what the device needs.

    Returns:
        The store through which all processes reach each other; None for a process alone.

    Raises:
        ProcessGroupError: the other processes did not arrive in time.
        UsageError: the timeout is not positive.
    """
    if timeout_s <= 0:
        raise UsageError(f"--dist_timeout_s {timeout_s}: must be a positive number of seconds")
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    timeout = timedelta(seconds=timeout_s)
    backend = backend or default_backend(has_cuda=torch.cuda.is_available())
    device = None
    if "nccl" in backend:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    store, rank, world_size = _meet(max(timeout, timedelta(seconds=_JOIN_AT_LEAST_S)))
    store.set_timeout(timeout)
    # Meshes and DeepSpeed create their groups without a timeout; this is what they get then.
    distributed_c10d.default_pg_timeout = timeout
    distributed_c10d.default_pg_nccl_timeout = timeout
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world_size, timeout=timeout, device_id=device
    )
    return store


def default_backend(*, has_cuda: bool) -> str:
    """Return the backend for this machine, as accelerate would choose it.

    A full state dict gathered by FSDP, and parameters offloaded by it, need collectives on CPU too.
    """
    if not has_cuda:
        return "gloo"
    env = os.environ
    is_fsdp = env.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    is_offloaded = env.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true"
    is_gathered = env.get("FSDP_STATE_DICT_TYPE") == "FULL_STATE_DICT"
    return "cuda:nccl,cpu:gloo" if is_fsdp and (is_offloaded or is_gathered) else "nccl"


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Add up a tensor of all ranks in place and return it; collective where there are several."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def leave_process_group() -> None:
    """Destroy the default process group and all others, if there are any.

    Call it on all ranks after their last collective: the store lives in rank 0, or in its agent.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


def _meet(patience: timedelta) -> tuple[dist.Store, int, int]:
    """Wait until all processes reach the store; return it with rank and world size."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    began = time.monotonic()
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=patience))
        store = dist.PrefixStore("qwen3_sft", store)
        if store.add("arrived", 1) >= world_size:
            store.set("all_arrived", "1")
        store.wait(["all_arrived"], patience)
    except dist.DistError as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        waited = time.monotonic() - began
        if waited < _AT_ONCE_S:  # such as an address in use
            raise ProcessGroupError(
                f"rank {rank} cannot meet the others at {where}: {error}. If the port is in use, "
                "set another MASTER_PORT (accelerate launch: --main_process_port)"
            ) from error
        raise ProcessGroupError(
            f"rank {rank} waited {patience.total_seconds():.0f} s at {where} and not all of the "
            f"{world_size} processes came. Look for the first error on the other nodes. If they "
            "only prepare data for longer, set --dist_timeout_s to more seconds, or "
            f"--data_cache_dir to a folder that all nodes share. ({error})"
        ) from error
    return store, rank, world_size

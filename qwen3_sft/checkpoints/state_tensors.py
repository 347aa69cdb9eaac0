"""The tensors of a run's state: each in full, one after another, or what one process holds of it.

A model may be whole (one process, DDP, ZeRO-2), made of DTensors (accelerate's FSDP2; transformers'
FSDP2 with expert parallelism, where experts lie on another mesh than the rest) or partitioned by
DeepSpeed ZeRO-3, which leaves parameters empty between forward passes. Gathering the whole state
dict would need the model a second time in rank 0's memory; one tensor at a time does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from qwen3_sft.distributed.rank_zero import process_rank

# What activation checkpointing and torch.compile put into the names of a module's children.
_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")


def full_tensors(
    model: Any, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor | None]]:
    """Yield each entry of the state dict once, in the same order on every rank.

    Collective: every rank runs the loop to its end, also one that has no more use for the tensors;
    otherwise the others wait in a gather until the process group's timeout.

    Args:
        model: without DDP's or DeepSpeed's own wrapper (`accelerator.unwrap_model`).
        dtype: of the yielded floating-point tensors; DTensors are cast before they are gathered.
            None leaves them as they are.

    Yields:
        The plain name, and on rank 0 the full tensor (detached, on any device; it may be the live
        parameter itself), elsewhere None. Weights that are tied appear once, under the name that
        `save_pretrained` keeps.
    """
    is_first = process_rank() == 0
    for name, value in _entries(model).items():
        wanted = dtype if dtype is not None and value.is_floating_point() else value.dtype
        yield name, _gather(value, wanted, is_first)


def _entries(model: Any) -> dict[str, Tensor]:
    # keep_vars: tied weights and ZeRO-3's are told by the parameter object itself.
    named = {plain_name(k): v for k, v in model.state_dict(keep_vars=True).items()}
    dependent = getattr(model, "all_tied_weights_keys", None) or {}
    by_parameter: dict[int, list[str]] = {}
    for name, value in named.items():
        by_parameter.setdefault(id(value), []).append(name)
    kept = {
        next((name for name in names if name not in dependent), names[0])
        for names in by_parameter.values()
    }
    return {name: value for name, value in named.items() if name in kept}


def plain_name(name: str) -> str:
    """Return a parameter's name without what wrappers of modules have put into it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _gather(value: Any, dtype: torch.dtype, is_first: bool) -> Tensor | None:
    if isinstance(value, DTensor):
        full = _gather_dtensor(value, dtype)
        return full if is_first else None
    if getattr(value, "ds_id", None) is not None:
        return _gather_zero3(value, dtype, is_first)
    return value.detach().to(dtype) if is_first else None


def _gather_dtensor(value: Any, dtype: torch.dtype) -> Tensor:
    """Gather over all dimensions of the mesh; a _StridedShard comes back in its right order.

    An offloaded shard returns to its device first: NCCL moves nothing that lies on the CPU.
    """
    local: Any = value.detach().to(value.device_mesh.device_type, dtype)
    return local.full_tensor()


def _gather_zero3(value: Any, dtype: torch.dtype, is_first: bool) -> Tensor | None:
    from deepspeed import zero

    with zero.GatheredParameters([value]):
        # Leaving the context partitions the parameter again, hence the copy.
        return value.detach().to("cpu", dtype, copy=True) if is_first else None


# ---- what one process holds, which its checkpoints are made of ----


def model_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and buffers, tied ones once."""
    for name, parameter in model.named_parameters():
        yield plain_name(name), parameter
    for name, buffer in model.named_buffers():
        yield plain_name(name), buffer


def optimizer_tensors(model: nn.Module, optimizer: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield an optimizer's states, and the weights in it that are not the model's.

    DeepSpeed's optimizers have such weights: each process's part of the float32 master weights, in
    the optimizer of torch's below them.
    """
    while (below := getattr(optimizer, "optimizer", None)) is not None:
        optimizer = below
    names = {id(parameter): plain_name(name) for name, parameter in model.named_parameters()}
    grouped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    # ZeRO-3 takes its parts out of the groups between steps and leaves their states.
    for parameter in (*grouped, *optimizer.state):
        if id(parameter) not in names:
            names[id(parameter)] = f"part {len(names)} of the optimizer's weights"
            yield names[id(parameter)], parameter
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                yield f"the optimizer's {key} of {names[id(parameter)]}", value


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the plain tensors that lie in this process for one: quantised ones have several."""
    part = local_part(tensor)
    if is_traceable_wrapper_subclass(part):
        for name in part.__tensor_flatten__()[0]:
            yield from plain_tensors(getattr(part, name))
    else:
        yield part.detach()


def local_part(parameter: Tensor) -> Tensor:
    """Return what this process holds of a parameter: its shard of a DTensor or ZeRO-3's, or all."""
    if isinstance(parameter, DTensor):
        return parameter.to_local()
    return getattr(parameter, "ds_tensor", parameter)  # DeepSpeed's name for its partition

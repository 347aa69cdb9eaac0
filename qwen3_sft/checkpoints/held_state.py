"""What one process holds of a run's state, tensor by tensor: what its checkpoint is made of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from qwen3_sft.checkpoints.state_tensors import plain_name


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

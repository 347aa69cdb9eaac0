"""Which layers compute again in the backward pass, and how much of themselves.

A policy holds for a number of layers rather than for all, so that memory that is left is used:
`full` for the first layers, then `selective`, then `none` for the last ones, whose activations are
the first to be freed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from qwen3_sft.families.family import family_of
from qwen3_sft.model.selective_checkpointing import selective_contexts


def enable_checkpointing(
    model: PreTrainedModel, layers: Mapping[Policy, int], *, offload: bool = False
) -> None:
    """Set the policy of each decoder layer; transformers' Trainer must not set one too.

    Args:
        model: of a family. `selective` saves what it should only where the experts run as
            `scatter_moe_recompute`; with other experts the result is right and the memory larger.
        layers: number of layers by policy; they add up to all.
        offload: keep the inputs of layers that compute again in host memory, pinned on a GPU.
            Copied on the stream of the computation: 4 KB per token and layer of the 30B model each
            way, where the layer costs 0.4 GFLOP per token and more the longer the documents.

    Raises:
        ValueError: the counts do not add up to the model's layers.
        ModelError: no family has its `model_type`.
    """
    decoder = family_of(model.config).architecture.layers_in(model).values()
    policies = [policy for policy in ORDER for _ in range(layers.get(policy, 0))]
    if len(policies) != len(decoder):
        raise ValueError(f"{dict(layers)} are {len(policies)} of {len(decoder)} layers")
    if set(policies) == {"none"}:
        return
    model.activation_checkpointing_enable({"use_reentrant": False})
    hidden_size = model.config.get_text_config().hidden_size
    functions = {
        "full": partial(checkpoint, use_reentrant=False),
        "selective": partial(
            checkpoint, use_reentrant=False, context_fn=partial(selective_contexts, hidden_size)
        ),
    }
    if offload:
        functions = {k: partial(_on_host, f, hidden_size) for k, f in functions.items()}
    for module, policy in zip(decoder, policies, strict=True):
        layer: Any = module
        layer.gradient_checkpointing = policy != "none"
        layer._gradient_checkpointing_func = functions.get(policy)


def _on_host(recompute: Callable[..., Any], hidden_size: int, *args: Any, **kwargs: Any) -> Any:
    """Run a checkpointed layer whose inputs wait in host memory.

    What a checkpoint saves are its inputs; its own hooks hide what is computed inside. Those that
    all layers share, the rotary embedding's, stay where they are.
    """

    def to_host(tensor: Tensor) -> tuple[torch.device, Tensor]:
        if tensor.shape[-1:] != (hidden_size,):
            return tensor.device, tensor
        host = torch.empty(
            tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda
        )
        return tensor.device, host.copy_(tensor, non_blocking=True)

    def back(packed: tuple[torch.device, Tensor]) -> Tensor:
        device, tensor = packed
        return tensor.to(device, non_blocking=True)

    with saved_tensors_hooks(to_host, back):
        return recompute(*args, **kwargs)


Policy = Literal["none", "selective", "full"]


# From the first layer to the last: what is kept of the last ones is freed first.
ORDER: tuple[Policy, ...] = ("full", "selective", "none")

"""Which layers compute again in the backward pass, and how much of themselves.

A policy holds for a number of layers rather than for all, so that memory that is left is used:
`full` for the first layers, then `selective`, then `none` for the last ones, whose activations are
the first to be freed.

Plain checkpointing (`full`) keeps a layer's input and runs the whole layer a second time, attention
and experts included. With `selective` the backward pass finds in memory what costs most per byte:
attention's output, its projection, the experts' output and the routing. What runs again are norms,
the q, k and v projections, rotary embedding and, inside the experts' own backward, their first
product (`scatter_moe_recompute`). Routing that is kept is routing that is replayed: a token cannot
visit another expert in the backward pass than in the forward.

Bytes per token and layer of Qwen3-30B-A3B in bfloat16: 4,096 input, 8,192 + 128 attention and its
log-sum-exp, 4,096 projection, 4,096 experts, 0.2 KB routing: 1.0 MB per token over 48 layers. Plain
checkpointing keeps 0.2 MB and recomputes 5 of the 6 GFLOP of a token's forward, `selective` 1.1
(`docs/performance.md`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from transformers import PreTrainedModel

from qwen3_sft.errors import ModelError
from qwen3_sft.families.family import family_of

Policy = Literal["none", "selective", "full"]

# From the first layer to the last: what is kept of the last ones is freed first.
ORDER: tuple[Policy, ...] = ("full", "selective", "none")

# Operators whose results are kept, by name: some exist only where a package or a device does.
# One of these runs in a layer; the others belong to other devices, versions and packages.
ATTENTION = frozenset(
    {
        "torch_attn._varlen_attn.default",
        "flash_attn._flash_attn_varlen_forward.default",
        "aten._scaled_dot_product_flash_attention.default",
        "aten._scaled_dot_product_efficient_attention.default",
        "aten._scaled_dot_product_cudnn_attention.default",
        "aten._scaled_dot_product_flash_attention_for_cpu.default",
        "aten._scaled_dot_product_fused_attention_overrideable.default",
    }
)
KEPT = ATTENTION | {
    "monkey_patch.scatter_moe.default",
    "monkey_patch.route.default",
    "aten.topk.default",  # the routing where that operator does not run
}


@dataclass
class SeenOperators:
    """What layers that are checkpointed selectively have run so far.

    Attributes:
        names: of operators whose results are kept.
        ran: whether any operator was seen at all: none is where a compiled graph was cached.
    """

    names: set[str] = field(default_factory=set)
    ran: bool = False

    def check(self, implementation: str) -> None:
        """Refuse to go on where attention runs twice without a word.

        Args:
            implementation: of attention, for the message.

        Raises:
            ModelError: no operator of attention is known by its name.
        """
        if self.ran and not self.names & ATTENTION:
            raise ModelError(
                f"selective checkpointing keeps no result of attention {implementation!r}: none of "
                "its operators is known here, so it would run twice and the plan would be wrong; "
                "set --attn_implementation torch_varlen, or --activation_checkpointing full"
            )


def enable_checkpointing(
    model: PreTrainedModel, layers: Mapping[Policy, int], *, offload: bool = False
) -> SeenOperators:
    """Set the policy of each decoder layer; transformers' Trainer must not set one too.

    Args:
        model: of a family. `selective` saves what it should only where the experts run as
            `scatter_moe_recompute`; with other experts the result is right and the memory larger.
        layers: number of layers by policy; they add up to all.
        offload: keep the inputs of layers that compute again in host memory, pinned on a GPU.
            Copied on the stream of the computation: 4 KB per token and layer of the 30B model each
            way, where the layer costs 0.4 GFLOP per token and more the longer the documents.

    Returns:
        What the selective layers will have run.

    Raises:
        ValueError: the counts do not add up to the model's layers.
        ModelError: no family has its `model_type`.
    """
    decoder = family_of(model.config).architecture.layers_in(model).values()
    policies = [policy for policy in ORDER for _ in range(layers.get(policy, 0))]
    if len(policies) != len(decoder):
        raise ValueError(f"{dict(layers)} are {len(policies)} of {len(decoder)} layers")
    seen = SeenOperators()
    if set(policies) == {"none"}:
        return seen
    model.activation_checkpointing_enable({"use_reentrant": False})
    hidden_size = model.config.get_text_config().hidden_size
    functions = {
        "full": partial(checkpoint, use_reentrant=False),
        "selective": partial(
            checkpoint,
            use_reentrant=False,
            context_fn=partial(selective_contexts, hidden_size, seen),
        ),
    }
    if offload:
        functions = {k: partial(_on_host, f, hidden_size) for k, f in functions.items()}
    for module, policy in zip(decoder, policies, strict=True):
        layer: Any = module
        layer.gradient_checkpointing = policy != "none"
        layer._gradient_checkpointing_func = functions.get(policy)
    return seen


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


def selective_contexts(hidden_size: int, seen: SeenOperators) -> tuple[Any, Any]:
    """Return the contexts of a layer's forward and of its recomputation (torch's `context_fn`).

    Args:
        hidden_size: of the model, by which the projection that ends attention is known.
        seen: receives the operators that run.
    """
    return create_selective_checkpoint_contexts(partial(_policy, hidden_size, seen))


def _policy(
    hidden_size: int, seen: SeenOperators, context: Any, op: Any, *args: Any, **kwargs: Any
) -> CheckpointPolicy:
    seen.ran = True
    name = str(op)
    if name in KEPT:
        seen.names.add(name)
    if name in KEPT or _is_output_projection(hidden_size, op, args):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _is_output_projection(hidden_size: int, op: Any, args: tuple[Any, ...]) -> bool:
    """The product that ends attention: the one of a layer that has hidden_size columns."""
    return op is torch.ops.aten.mm.default and args[1].shape[1] == hidden_size

"""Activation checkpointing that keeps what is dear to compute and computes again what is cheap.

Plain checkpointing keeps a layer's input and runs the whole layer a second time, attention and
experts included. Here the backward pass finds in memory what costs most per byte: attention's
output, its projection, the experts' output and the routing. What runs again are norms, the q, k and
v projections, rotary embedding and, inside the experts' own backward, the first product of the
experts (`scatter_moe_recompute`). Routing that is kept is routing that is replayed: a token cannot
visit another expert in the backward pass than in the forward.

Bytes per token and layer of Qwen3-30B-A3B in bfloat16: 4,096 input, 8,192 + 128 attention and its
log-sum-exp, 4,096 projection, 4,096 experts, 0.2 KB routing: 1.0 MB per token over 48 layers. Plain
checkpointing keeps 0.2 MB and recomputes 5 of the 6 GFLOP of a token's forward, this 1.1
(`docs/performance.md`).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

# Operators whose results are kept, by name: some exist only where a package or a device does.
# One of attention's runs in a layer; the others belong to other devices, versions and packages.
KEPT = frozenset(
    {
        "monkey_patch.scatter_moe.default",
        "monkey_patch.route.default",
        "aten.topk.default",  # the routing where that operator does not run
        "torch_attn._varlen_attn.default",
        "flash_attn._flash_attn_varlen_forward.default",
        "flash_attn_3.fwd.default",
        "aten._scaled_dot_product_flash_attention.default",
        "aten._scaled_dot_product_efficient_attention.default",
        "aten._scaled_dot_product_cudnn_attention.default",
        "aten._scaled_dot_product_flash_attention_for_cpu.default",
        "aten._scaled_dot_product_fused_attention_overrideable.default",
    }
)


def selective_contexts(hidden_size: int) -> tuple[Any, Any]:
    """Return the contexts of a layer's forward and of its recomputation (torch's `context_fn`).

    Args:
        hidden_size: of the model, by which the projection that ends attention is known.
    """
    return create_selective_checkpoint_contexts(partial(_policy, hidden_size))


def _policy(hidden_size: int, context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if str(op) in KEPT or _is_output_projection(hidden_size, op, args):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _is_output_projection(hidden_size: int, op: Any, args: tuple[Any, ...]) -> bool:
    """The product that ends attention: the one of a layer that has hidden_size columns."""
    return op is torch.ops.aten.mm.default and args[1].shape[1] == hidden_size

"""What float32 weights of experts cost each micro-batch: a cast to the dtype of the products.

Autocast keeps its copies of dense weights for a whole pass. The experts' are as large as the model
and kept by nobody: the operator casts each weight for the stage that multiplies by it, reading 4
bytes of a parameter and writing 2. In one micro-batch

    none        both weights in the forward and in the backward pass
    selective   the same, and gate_up once more for the product that is computed again
    full        the whole forward twice

A copy that is made once per update would move 6 bytes and keep 2; docs/performance.md says why
weights in bfloat16 with stochastic rounding are recommended instead.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from qwen3_sft.model.activation_checkpointing import Policy

_GATE_UP = 2 / 3  # of an expert's parameters
_CASTS: dict[Policy, float] = {"none": 2, "selective": 2, "full": 3}


def expert_cast_bytes(
    experts: int,
    layers: Mapping[Policy, int],
    *,
    keeps_hidden: bool,
    weights: torch.dtype,
    compute: torch.dtype,
) -> int:
    """Return the bytes read and written by casts of a micro-batch, 0 where nothing is cast.

    Args:
        experts: parameters of all experts.
        layers: number of layers by policy.
        keeps_hidden: whether the experts keep their first product, and compute none again.
        weights: dtype of the weights that the operator is given.
        compute: of the products.
    """
    if weights == compute:
        return 0
    casts = sum(count * _CASTS[policy] for policy, count in layers.items()) / sum(layers.values())
    casts += 0 if keeps_hidden else _GATE_UP
    return int(experts * casts * (weights.itemsize + compute.itemsize))

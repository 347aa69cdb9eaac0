"""Bytes that an optimizer keeps for a model's parameters, needs for an update, and moves.

Tensor by tensor, as the optimizers themselves decide (torchao 0.18 `_AdamBase._new_buffer`,
transformers 5.23 `Adafactor`, optimizers/low_bit_step.py and adafactor.py here): torchao quantises
what has at least 4,096 elements and whole blocks, Adafactor keeps a row and a column of each
matrix. An optimizer that is not known here is planned as torch's AdamW, and its text says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from qwen3_sft.optimizers.choice import OptimizerChoice

_SMALLEST, _BLOCK = 4096, 256  # transformers asks for 256 with 4 bits too, torchao's default is 128

# Elements of a slice and bytes of temporaries per element, compiled for a GPU and run eagerly, of
# optimizers/low_bit_step.py and adafactor.py. Measured on a CPU; those of a GPU are assumed to be
# the same as of what inductor compiles for a CPU.
_SLICES = {"cuda": (1 << 26, 8), "cpu": (1 << 18, 56)}
_ADAFACTOR_SLICES = {"cuda": (1 << 26, 8), "cpu": (1 << 20, 29)}


def state_bytes(
    shapes: Sequence[tuple[int, ...]], choice: OptimizerChoice, weights: torch.dtype
) -> int:
    """Return the bytes of all states on one GPU.

    Args:
        shapes: of the parameters there (of its shards, where they are sharded).
        choice: of the optimizer.
        weights: dtype of the parameters.
    """
    return sum(_of_tensor(shape, choice, weights) for shape in shapes)


def _of_tensor(shape: tuple[int, ...], choice: OptimizerChoice, weights: torch.dtype) -> int:
    elements = math.prod(shape)
    if choice.row.states == "adafactor":
        if len(shape) < 2:
            return 4 * elements
        return 4 * (elements // shape[-1] + elements // shape[-2])
    if choice.row.states == "adamw":
        return 2 * elements * weights.itemsize
    block = int(choice.given.get("block_size", _BLOCK))
    if elements < _SMALLEST or elements % block:
        # In the backward pass they are kept in float32, see LowBitStep.
        return 2 * elements * (4 if choice.in_backward else weights.itemsize)
    codes = int(elements * choice.row.code_bytes)
    return 2 * (codes + elements // block * 4) + _tables(choice)


def _tables(choice: OptimizerChoice) -> int:
    """Bytes of the two float32 tables that each pair of integer states carries."""
    return 0 if choice.has_fp8_states else 2 * 4 * choice.row.table


def update_bytes(
    shapes: Sequence[tuple[int, ...]],
    choice: OptimizerChoice,
    weights: torch.dtype,
    device: str = "cuda",
) -> int:
    """Return the bytes of temporaries of the largest update, gradients and states apart.

    Fused AdamW has none; `adamw_torch` takes the root of all second moments at once on a GPU, and
    elsewhere tensor by tensor, with a quotient beside it. torchao's own step is compiled over whole
    tensors. Transformers' Adafactor holds the gradient and the weight in float32 and two more
    tensors like them.

    Args:
        shapes: of the parameters on one GPU.
        choice: of the optimizer.
        weights: dtype of the parameters.
        device: what computes, `cuda` or `cpu`, where slices are shorter and run eagerly.
    """
    sizes = [math.prod(shape) for shape in shapes]
    largest = max(sizes)
    if choice.is_sliced:
        slices = _ADAFACTOR_SLICES if choice.row.states == "adafactor" else _SLICES
        size, per_element = slices[device]
        return min(largest, size) * per_element
    if choice.row.states == "low_bit":
        return largest * _SLICES["cuda"][1]
    if choice.row.states == "adafactor":
        return largest * (8 if weights == torch.float32 else 16)
    if choice.row.is_fused:
        return 0
    if device == "cpu":
        return 2 * largest * weights.itemsize
    return (largest if choice.in_backward else sum(sizes)) * weights.itemsize


def moved_bytes(
    shapes: Sequence[tuple[int, ...]], choice: OptimizerChoice, weights: torch.dtype
) -> float:
    """Return the bytes per parameter that an update reads and writes.

    Weights and states once each way, the gradient once for its norm and once for the update;
    Adafactor in slices reads it four times.

    Args:
        shapes: of the parameters.
        choice: of the optimizer.
        weights: dtype of the parameters and their gradients.
    """
    states = state_bytes(shapes, choice, weights) / sum(map(math.prod, shapes))
    reads = 4 if choice.row.states == "adafactor" else 2
    return (2 + reads) * weights.itemsize + 2 * states

"""Bytes that an optimizer keeps for a model's parameters, needs for an update, and moves.

Tensor by tensor, as the optimizers themselves decide (torchao 0.18 `_AdamBase._new_buffer`,
transformers 5.23 `Adafactor`, optimizers/low_bit_step.py and adafactor.py here): torchao quantises
what has at least 4,096 elements and whole blocks, Adafactor keeps a row and a column of each
matrix. An optimizer that is not known here is planned as torch's AdamW, and its text says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

_CODE_BYTES = {"adamw_torch_8bit": 1.0, "adamw_torch_4bit": 0.5}
_ADAMW = ("adamw_torch", "adamw_torch_fused")
_SMALLEST, _BLOCK = 4096, 256  # transformers asks for 256 with 4 bits too, torchao's default is 128

# Elements of a slice and bytes of temporaries per element, compiled for a GPU and run eagerly, of
# optimizers/low_bit_step.py and adafactor.py. Measured on a CPU; those of a GPU are assumed to be
# the same as of what inductor compiles for a CPU.
_SLICES = {"cuda": (1 << 26, 8), "cpu": (1 << 18, 56)}
_ADAFACTOR_SLICES = {"cuda": (1 << 26, 8), "cpu": (1 << 20, 29)}


@dataclass(frozen=True)
class OptimizerChoice:
    """What decides on an optimizer's memory.

    Attributes:
        optim: value of --optim.
        optim_args: value of --optim_args, such as `states=fp8,bf16_stochastic_round=True`.
        in_backward: --optimizer_in_backward.
    """

    optim: str = "adamw_torch_fused"
    optim_args: str | None = None
    in_backward: bool = False

    @property
    def given(self) -> dict[str, str]:
        """The pairs of `optim_args`."""
        pairs = (self.optim_args or "").replace(" ", "").split(",")
        return {pair.split("=", 1)[0]: pair.split("=", 1)[-1] for pair in pairs if pair}

    @property
    def is_low_bit(self) -> bool:
        """Whether it is of torchao's low-bit AdamW family."""
        return self.optim in _CODE_BYTES

    @property
    def is_known(self) -> bool:
        """Whether its states are counted, not assumed to be AdamW's."""
        return self.optim in (*_CODE_BYTES, *_ADAMW, "adafactor")

    @property
    def is_sliced(self) -> bool:
        """Whether it updates a tensor slice by slice."""
        if self.optim == "adafactor":
            rounds = self.given.get("bf16_stochastic_round", "").lower() == "true"
            return self.in_backward or rounds
        return self.is_low_bit and self.in_backward

    def describe(self) -> str:
        """Return the words of a plan's row."""
        if self.optim == "adafactor":
            return "optimizer (Adafactor, a row and a column of each matrix)"
        if self.is_low_bit:
            kind = "fp8" if self.given.get("states") == "fp8" else self.optim.rpartition("_")[2]
            return f"optimizer (AdamW, two states in {kind})"
        unknown = "" if self.is_known else f"; --optim {self.optim} is not counted"
        return f"optimizer (AdamW, two states{unknown})"


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
    if choice.optim == "adafactor":
        if len(shape) < 2:
            return 4 * elements
        return 4 * (elements // shape[-1] + elements // shape[-2])
    if not choice.is_low_bit:
        return 2 * elements * weights.itemsize
    block = int(choice.given.get("block_size", _BLOCK))
    if elements < _SMALLEST or elements % block:
        # In the backward pass they are kept in float32, see LowBitStep.
        return 2 * elements * (4 if choice.in_backward else weights.itemsize)
    codes = int(elements * _CODE_BYTES[choice.optim])
    return 2 * (codes + elements // block * 4) + _tables(choice)


def _tables(choice: OptimizerChoice) -> int:
    """Bytes of the two float32 tables that each pair of integer states carries."""
    if choice.given.get("states") == "fp8":
        return 0
    return 2 * 4 * (256 if choice.optim == "adamw_torch_8bit" else 16)


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
        slices = _ADAFACTOR_SLICES if choice.optim == "adafactor" else _SLICES
        size, per_element = slices[device]
        return min(largest, size) * per_element
    if choice.is_low_bit:
        return largest * _SLICES["cuda"][1]
    if choice.optim == "adafactor":
        return largest * (8 if weights == torch.float32 else 16)
    if choice.optim != "adamw_torch":
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
    reads = 4 if choice.optim == "adafactor" else 2
    return (2 + reads) * weights.itemsize + 2 * states

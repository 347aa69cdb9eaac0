"""A kernel launch as a value: one description is run, interpreted or compiled ahead of time."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import Any

import torch

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def takes_kernels(tensor: torch.Tensor) -> bool:
    """Tell whether Triton computes this input: on CUDA, or interpreted on request."""
    is_reachable = tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    return is_reachable and tensor.dtype in _DTYPES


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel with everything it is launched with.

    Attributes:
        kernel: a `triton.jit` function.
        grid: number of programs.
        arguments: by parameter name: tensors, `TensorDescriptor`s, integers and constexprs. Meta
            tensors do for compiling.
        num_warps: warps per program.
        num_stages: depth of software pipelining.
    """

    kernel: Any
    grid: int
    arguments: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2

    def run(self) -> None:
        """Launch on the current stream of the tensors' device; an empty grid launches nothing."""
        if self.grid == 0:
            return
        tensor = next(v for v in self.arguments.values() if isinstance(v, torch.Tensor))
        if not tensor.is_cuda:
            self._check_interpreter()
        # Triton launches on the current device, which need not be the tensors'.
        with torch.cuda.device_of(tensor):
            self.kernel[(self.grid,)](
                **self.arguments, num_warps=self.num_warps, num_stages=self.num_stages
            )

    def _check_interpreter(self) -> None:
        """Refuse what Triton's interpreter gets wrong without an error.

        Raises:
            RuntimeError: an operand is bfloat16, whose bit patterns it multiplies.
        """
        tensors = [v for v in self.arguments.values() if isinstance(v, torch.Tensor)]
        is_half = any(tensor.dtype == torch.bfloat16 for tensor in tensors)
        if is_half and not interpreter_multiplies_bfloat16():
            raise RuntimeError(
                f"{self.name}: with TRITON_INTERPRET=1 this Triton computes products of bfloat16 "
                "wrong, without an error of its own: use float32, or unset TRITON_INTERPRET"
            )

    @property
    def name(self) -> str:
        """The kernel's name, for messages."""
        return self.kernel.fn.__name__.strip("_")


@functools.cache
def interpreter_multiplies_bfloat16() -> bool:
    """Whether a product of ones in bfloat16 is right in Triton's interpreter (not in 3.7.1)."""
    from monkey_patch.kernels.interpreter_check import product_of_ones

    return product_of_ones()


def cdiv(numerator: int, denominator: int) -> int:
    """Divide and round up."""
    return -(-numerator // denominator)


def next_power_of_2(number: int) -> int:
    """Return the smallest power of two that is not below `number` >= 1."""
    return 1 << (number - 1).bit_length()

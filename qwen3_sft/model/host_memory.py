"""Load weights without holding more in host memory than has to be there.

Reading a checkpoint frees thousands of tensors of some megabytes, one per matrix of an expert,
after they are fused. glibc raises the size from which a block is mapped on its own when such a
block is freed, up to 32 MiB; from then on these tensors lie in heaps between one another and little
of it is returned. A model then takes up to twice its size to load, and keeps most of that
(bench/results/load_memory_cpu.json, `as found`).
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

# Of mallopt(3). Setting either ends glibc's own adjustment of both.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_AT_START = 128 * 2**10
_LARGEST = 32 * 2**20


@contextmanager
def blocks_given_back() -> Iterator[None]:
    """Map every block of 128 KiB and more on its own inside, so that freeing it returns it.

    Afterwards blocks of up to 32 MiB are kept for reuse, as glibc does by itself once it has seen
    them freed: what a training step on a CPU allocates should not be mapped anew in every step.
    Does nothing on another C library.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_THRESHOLD, _AT_START)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_THRESHOLD, _LARGEST)
        libc.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST)


def reserve_weights(model: nn.Module) -> None:
    """Put weights that are on meta on the CPU, unset: they get addresses, and memory if written to.

    accelerate's FSDP overwrites them all from the first process, and tells one from another by the
    address (accelerate 1.15, `Accelerator._prepare_fsdp2`); on meta that is 0 for each.
    """
    for name, weight in list(model.named_parameters()):
        if weight.is_meta:
            owner, _, leaf = name.rpartition(".")
            unset = torch.empty_like(weight, device="cpu")
            parameter = nn.Parameter(unset, requires_grad=weight.requires_grad)
            setattr(model.get_submodule(owner), leaf, parameter)

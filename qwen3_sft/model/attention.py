"""Which of the attention implementations a run uses, and why.

The order follows published figures: FlashAttention 4 reaches 1,613 TFLOP/s on B200, 71% of the peak
(its abstract, arXiv:2603.05451), FlashAttention 3 740 on H100, 75%, where FlashAttention 2 has 35%
(abstract of arXiv:2407.08608). torch's own variable-length kernels are FlashAttention 2's, so that
this package adds nothing to them, but for one thing: in torch before 2.13 they take no grouped keys
and values, which are then repeated. torch has no faster kernel of its own for packed documents: its
cuDNN path (`torch.nn.attention.varlen._should_use_cudnn`) is switched off up to 2.13. Below the
function of torch 2.11, FlashAttention 4 has no backward pass ("windowed attention not supported"):
its trial fails there, and the next one runs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from transformers.utils import (
    is_flash_attn_2_available,
    is_flash_attn_3_available,
    is_flash_attn_4_available,
)

from monkey_patch.kernels.varlen_attention.op import takes_groups
from qwen3_sft.errors import ModelError
from qwen3_sft.model.attention_trial import trial

logger = logging.getLogger(__name__)

TORCH = "torch_varlen"


@dataclass(frozen=True)
class Kernel:
    """A package's kernels.

    Attributes:
        is_installed: whether its package is there.
        majors: compute capabilities that it is written for, by their first number.
        head_dims: what it takes of a head on each of them.
    """

    is_installed: Callable[[], bool]
    majors: tuple[int, ...]
    head_dims: Callable[[int, int], bool]


def _fa4_takes(major: int, head_dim: int) -> bool:
    """As `_validate_head_dims` of flash-attn-4 4.0.0b36 has it."""
    return head_dim % 8 == 0 and (head_dim <= 256 if major == 9 else head_dim in (*range(129), 256))


# The fastest first; names as in transformers.
KERNELS = {
    "flash_attention_4": Kernel(is_flash_attn_4_available, (10,), _fa4_takes),
    "flash_attention_3": Kernel(
        is_flash_attn_3_available, (9,), lambda _, size: size % 8 == 0 and size <= 256
    ),
    "flash_attention_2": Kernel(
        is_flash_attn_2_available, (8, 9, 10, 12), lambda _, size: size % 8 == 0 and size <= 256
    ),
}


def check_attention(requested: str, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse what cannot run here, whatever the model.

    Args:
        requested: `auto` or a name.
        device: where the model runs.
        dtype: what attention computes in (the autocast dtype under autocast).

    Raises:
        ModelError: the one that is asked for needs another device or dtype, or its package.
    """
    if requested not in KERNELS:
        return
    if not _is_half(device, dtype):
        raise ModelError(
            f"--attn_implementation {requested} needs a CUDA device and bfloat16, this is "
            f"{device.type} in {dtype}; use auto"
        )
    if not KERNELS[requested].is_installed():
        raise ModelError(f"--attn_implementation {requested}: not installed; use auto")


def choose_attention(
    requested: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    *,
    capability: Callable[[torch.device], tuple[int, int]] = torch.cuda.get_device_capability,
    attempt: Callable[[str, torch.device, torch.dtype, int], str | None] = trial,
) -> tuple[str, str]:
    """Return the attention implementation and the reason for it.

    A kernel that a GPU is to run is tried on a few tokens first, forward and backward.

    Args:
        requested: `auto` or a name.
        device: where the model runs.
        dtype: what attention computes in.
        head_dim: channels of a head.
        capability: of a device.
        attempt: returns what is wrong with a kernel, None if it computes right.

    Raises:
        ModelError: as `check_attention`, or the one that is asked for computes wrong or not at all.
    """
    check_attention(requested, device, dtype)
    is_half = _is_half(device, dtype)
    if requested != "auto":
        is_tried = is_half and (requested in KERNELS or requested == TORCH)
        if is_tried and (problem := attempt(requested, device, dtype, head_dim)):
            raise ModelError(f"--attn_implementation {requested}: {problem}; use auto")
        return requested, "as requested"
    if not is_half:
        return TORCH, f"{device.type} in {dtype}: one attention call per document"
    failed = []
    for name, reason in _candidates(capability(device)[0], head_dim):
        problem = attempt(name, device, dtype, head_dim)
        if problem is None:
            return name, reason
        failed.append(f"{name}: {problem}")
        logger.warning("attention: %s is passed over: %s", name, problem)
    raise ModelError(f"no attention kernel computes right on this device: {'; '.join(failed)}")


def _is_half(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)


def _candidates(major: int, head_dim: int) -> Iterator[tuple[str, str]]:
    """Yield what is made for this device, the fastest first, and why."""
    fitting = [
        name for name, kernel in KERNELS.items()
        if major in kernel.majors and kernel.head_dims(major, head_dim) and kernel.is_installed()
    ]  # fmt: skip
    for name in fitting:
        if name != "flash_attention_2":
            yield name, f"installed, and made for compute capability {major}.x"
    if "flash_attention_2" in fitting and not takes_groups():
        yield "flash_attention_2", "installed; this torch's own kernels repeat keys and values"
    yield TORCH, "torch's own variable-length kernels, those of FlashAttention 2"

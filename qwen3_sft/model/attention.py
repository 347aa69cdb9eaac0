"""Which of the attention implementations a run uses, and why."""

from __future__ import annotations

import torch
from transformers.utils import (
    is_flash_attn_2_available,
    is_flash_attn_3_available,
    is_flash_attn_4_available,
)

from qwen3_sft.errors import ModelError


def choose_attention(requested: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """Return the attention implementation and the reason for it.

    Args:
        requested: `auto` or a name.
        device: where the model runs.
        dtype: what attention computes in (the autocast dtype under autocast).

    Raises:
        ModelError: the requested one cannot run here, or could not keep documents apart.
    """
    half = dtype in (torch.bfloat16, torch.float16)
    flash = {
        "flash_attention_4": is_flash_attn_4_available,
        "flash_attention_3": is_flash_attn_3_available,
        "flash_attention_2": is_flash_attn_2_available,
    }
    if requested == "auto":
        if device.type == "cuda" and half:
            for name, is_available in flash.items():
                if is_available():
                    return name, "installed and the fastest that is"
            return "torch_varlen", "flash-attn is not installed; torch's own varlen kernels"
        return "torch_varlen", f"{device.type} in {dtype}: one attention call per document"
    if requested in flash:
        if device.type != "cuda" or not half:
            raise ModelError(
                f"--attn_implementation {requested} needs a CUDA device and bfloat16, this is "
                f"{device.type} in {dtype}; use auto"
            )
        if not flash[requested]():
            raise ModelError(f"--attn_implementation {requested}: not installed; use auto")
    return requested, "as requested"

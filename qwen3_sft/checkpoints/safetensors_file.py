"""Tensors to a stream in the safetensors format, which the library itself writes to paths only.

8 bytes, little endian: the length of the header. The header: JSON, padded with spaces to a multiple
of 8. Then the tensors' bytes one after another, those with the widest elements first, so that each
is aligned (https://github.com/safetensors/safetensors, "Format").
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# In the order in which the library sorts them, the first last.
_NAMES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3", torch.int16: "I16", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.int32: "I32", torch.float32: "F32", torch.float64: "F64",
    torch.int64: "I64",
}  # fmt: skip
_ORDER = tuple(_NAMES)


def write_tensors(tensors: Mapping[str, Tensor], file: Any) -> None:
    """Write a whole file, byte by byte what `save_file` writes with `metadata={"format": "pt"}`.

    Args:
        tensors: plain ones on the CPU, of a dtype in `_NAMES`; no two need share memory.
        file: with `write`; not closed.

    Raises:
        ValueError: a tensor of another dtype.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in (names := _sorted(tensors)):
        tensor = tensors[name]
        end = start + tensor.nbytes
        header[name] = {
            "dtype": _NAMES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [start, end]
        }  # fmt: skip
        start = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for name in names:
        if tensors[name].numel():
            file.write(tensors[name].contiguous().view(-1).view(torch.uint8).numpy())


def _sorted(tensors: Mapping[str, Tensor]) -> list[str]:
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise ValueError(f"{name}: no safetensors name for {tensor.dtype}")
    return sorted(tensors, key=lambda name: (-_ORDER.index(tensors[name].dtype), name))

"""Which devices multiply FP8, and which take the scales of mxfp8."""

from __future__ import annotations

# Compute capabilities.
FP8_SINCE = (8, 9)
MXFP8_SINCE = (10, 0)  # tensor cores that take a power of two for every 32 values


def fp8_problem(device: str, capability: tuple[int, int], scaling: str = "") -> str | None:
    """Return why FP8 products do not run on a device, or None if they do.

    Args:
        device: its type, such as "cuda".
        capability: of a CUDA device; of no meaning on others.
        scaling: of the operands; "mxfp8" needs a newer device than the others.
    """
    if device in ("cpu", "meta"):
        return None
    if device != "cuda":
        return f"a device without FP8: {device}; it runs on CUDA and, emulated, on a CPU"
    has = f"compute capability {capability[0]}.{capability[1]}"
    if capability < FP8_SINCE:
        return (
            f"a device without FP8: {has}, FP8 needs {FP8_SINCE[0]}.{FP8_SINCE[1]} "
            "(Ada, Hopper, Blackwell) or higher; leave FP8 off"
        )
    if scaling == "mxfp8" and capability < MXFP8_SINCE:
        return (
            f"a device without mxfp8: {has}, its scales need {MXFP8_SINCE[0]}.{MXFP8_SINCE[1]} "
            "(Blackwell) or higher; set the scaling blockwise"
        )
    return None


def require_fp8_products(capability: tuple[int, int], name: str, scaling: str) -> None:
    """Refuse a CUDA device whose tensor cores do not multiply FP8 with such scales.

    Args:
        capability: of the device, such as (9, 0).
        name: of the device, for the message.
        scaling: of the operands.

    Raises:
        ValueError: with what `fp8_problem` returns.
    """
    if problem := fp8_problem("cuda", capability, scaling):
        raise ValueError(f"{name} is {problem}")

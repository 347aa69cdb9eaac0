"""Numbers in FP8 (e4m3) with float32 scales, in plain torch: the definition for every backend.

A block of neighbouring values shares one scale, the largest of their magnitudes / 448 (e4m3's
largest value), computed in float32; a block of zeros has scale 1. A value becomes value / scale,
divided in float32 and rounded to the nearest e4m3, ties to even. Nothing saturates, because the
largest value of a block becomes 448. No scale is below 2^-126, so that scales are never denormal:
blocks whose largest value is below 448 * 2^-126 lose precision, up to 2^-136 per value.

The trap: torch's cast, like the hardware's, turns infinity into a clean 448. Here a block that
holds an infinity or a NaN has a scale that is not finite, its non-finite values become NaN in e4m3,
and all of the block multiplies and dequantises to NaN.

Two scalings. Blockwise: 1 x 128 along the contraction for activations and gradients, 128 x 128 for
weights, the last block shorter, so that a weight and its transpose have the same values. Rowwise:
one scale for a row of activations and for each row of a weight that is contracted over, so that the
transposed use of a weight is another quantisation.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

Fp8 = Literal["off", "blockwise", "rowwise"]

BLOCK = 128
E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
_SMALLEST_SCALE = 2.0**-126


class Quantized(NamedTuple):
    """A tensor in FP8.

    Attributes:
        values: float8_e4m3fn.
        scales: float32, one for each block of values.
    """

    values: torch.Tensor
    scales: torch.Tensor


class QuantizedRows(NamedTuple):
    """Activations or gradients, to be contracted over their last dimension.

    Attributes:
        values: (M, K) float8_e4m3fn.
        scales: (M, ceil(K / 128)) float32, or (M, 1) rowwise.
        dtype: of what was quantised and of what a product with it returns.
    """

    values: torch.Tensor
    scales: torch.Tensor
    dtype: torch.dtype


class QuantizedWeight(NamedTuple):
    """A weight (E, M, K) in the layouts that one pass needs; None for one that it does not.

    Both are contracted over their last dimension, which FP8 products on Hopper ask to be the
    contiguous one.

    Attributes:
        forward: for products with W.T: values (E, M, K), scales (E, ceil(M / 128), ceil(K / 128))
            or, rowwise, (E, M, 1).
        backward: for products with W: values (E, K, M), scales (E, ceil(K / 128), ceil(M / 128))
            or, rowwise, (E, K, 1).
    """

    forward: Quantized | None
    backward: Quantized | None


class HiddenGradient(NamedTuple):
    """d_hidden twice: the weight gradient multiplies by one, the input gradient by the other.

    Attributes:
        full: (N, 2F) in the dtype of the activations.
        quantized: the same values in FP8.
    """

    full: torch.Tensor
    quantized: QuantizedRows


def quantize_rows(x_MK: torch.Tensor, block: int | None = BLOCK) -> Quantized:
    """Quantise each row in blocks of `block` neighbours.

    Args:
        x_MK: (M, K) bfloat16, float16 or float32.
        block: neighbours that share a scale; None is the whole row.

    Returns:
        values (M, K), scales (M, ceil(K / block)).
    """
    values_1MK, scales_1MB = _quantize(x_MK[None], 1, block or x_MK.shape[1])
    return Quantized(values_1MK[0], scales_1MB[0])


def quantize_weight(w_EMK: torch.Tensor, block: int | None = BLOCK) -> Quantized:
    """Quantise the matrix of each expert in blocks of `block` x `block`.

    Args:
        w_EMK: (E, M, K) bfloat16, float16 or float32.
        block: side of the square that shares a scale; None is one scale per row of K values, for
            products that contract over K.

    Returns:
        values (E, M, K), scales (E, ceil(M / block), ceil(K / block)) or, for None, (E, M, 1).
    """
    return _quantize(w_EMK, block or 1, block or w_EMK.shape[2])


def quantize_weight_layouts(
    w_EMK: torch.Tensor, block: int | None, *, forward: bool, backward: bool
) -> QuantizedWeight:
    """Quantise a weight for products with W.T (`forward`), with W (`backward`), or both."""
    transposed_EKM = w_EMK.transpose(1, 2).contiguous() if backward else None
    return QuantizedWeight(
        quantize_weight(w_EMK, block) if forward else None,
        None if transposed_EKM is None else quantize_weight(transposed_EKM, block),
    )


def dequantize(values: torch.Tensor, scales: torch.Tensor, block: int = BLOCK) -> torch.Tensor:
    """Return value * scale in float32, for rows and weights of either scaling.

    Args:
        values: (..., M, K) float8_e4m3fn.
        scales: (..., M or 1 or ceil(M / block), K or 1 or ceil(K / block)) float32.
        block: values that share a scale.
    """
    for dim in (-2, -1):
        width = values.shape[dim]
        if scales.shape[dim] not in (1, width):
            scales = scales.repeat_interleave(block, dim).narrow(dim, 0, width)
    return values.float() * scales


def _quantize(x_EMK: torch.Tensor, tall: int, wide: int) -> Quantized:
    experts, rows, width = x_EMK.shape
    padded = F.pad(x_EMK.float().contiguous(), (0, -width % wide, 0, -rows % tall))
    tiles = padded.view(experts, padded.shape[1] // tall, tall, padded.shape[2] // wide, wide)
    largest = tiles.abs().amax(dim=(2, 4))  # NaN if any value is
    # Both bounds let NaN and infinity pass.
    scales = torch.where(largest == 0, 1.0, (largest / E4M3_MAX).clamp_min(_SMALLEST_SCALE))
    values = (tiles / scales[:, :, None, :, None]).to(E4M3).view(padded.shape)
    return Quantized(values[:, :rows, :width].contiguous(), scales)

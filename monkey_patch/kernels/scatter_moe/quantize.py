"""Numbers in FP8 (e4m3) with scales, in plain torch: the definition for every backend.

A block of neighbouring values shares one scale, the largest of their magnitudes / 448 (e4m3's
largest value), computed in float32; a block of zeros has scale 1. A value becomes value / scale,
divided in float32 and rounded to the nearest e4m3, ties to even. Nothing saturates, because the
largest value of a block becomes 448. No scale is below 2^-126, so that scales are never denormal:
blocks whose largest value is below 448 * 2^-126 lose precision, up to 2^-136 per value.

The trap: torch's cast, like the hardware's, turns infinity into a clean 448. Here a block that
holds an infinity or a NaN has a scale that is not finite, its non-finite values become NaN in e4m3,
and all of the block multiplies and dequantises to NaN.

Three scalings. Blockwise: 1 x 128 along the contraction for activations and gradients, 128 x 128
for weights, the last block shorter, so that a weight and its transpose have the same values.
Rowwise: one scale for a row of activations and for each row of a weight that is contracted over, so
that the transposed use of a weight is another quantisation. mxfp8: 1 x 32 along the contraction for
all three (OCP Microscaling Formats 1.0), with scales that are powers of two in one byte, e8m0, as
Blackwell's tensor cores take them. A transposed weight is another quantisation again, whose values
differ only where one of both is among e4m3's denormals. What rounds to 2^128 becomes infinite.

The power of two of mxfp8 is rounded up: the smallest with which the block's largest value is at
most 448. The specification's own choice, 2^(floor(log2 largest) - 8), saturates blocks whose
largest value has a mantissa above 1.75, about a fifth of all, and draws that value to zero. A
product of two Gaussian operands has 28.5 dB this way and 27.6 that way, with log-normal rows 28.3
and 26.1 (tests/monkey_patch/kernels/test_quantize.py keeps the difference). What torchao calls
RCEIL and arXiv 2506.08027 trains with is rounded up too.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

Scaling = Literal["blockwise", "rowwise", "mxfp8"]
Fp8 = Literal["off", "blockwise", "rowwise", "mxfp8"]

BLOCK = 128
MX_BLOCK = 32
E4M3 = torch.float8_e4m3fn
E8M0 = torch.float8_e8m0fnu
E4M3_MAX = 448.0
_SMALLEST_SCALE = 2.0**-126
_E8M0_BIAS, _E8M0_NAN = 127, 255


class Quantized(NamedTuple):
    """A tensor in FP8.

    Attributes:
        values: float8_e4m3fn.
        scales: float32, or float8_e8m0fnu in mxfp8, one for each block of values.
    """

    values: torch.Tensor
    scales: torch.Tensor


class QuantizedRows(NamedTuple):
    """Activations or gradients, to be contracted over their last dimension.

    Attributes:
        values: (M, K) float8_e4m3fn.
        scales: (M, ceil(K / 128)) float32, (M, 1) rowwise, or (M, ceil(K / 32)) e8m0 in mxfp8.
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
        forward: for products with W.T: values (E, M, K), scales (E, ceil(M / 128), ceil(K / 128)),
            rowwise (E, M, 1), in mxfp8 (E, M, ceil(K / 32)).
        backward: for products with W: values (E, K, M), scales (E, ceil(K / 128), ceil(M / 128)),
            rowwise (E, K, 1), in mxfp8 (E, K, ceil(M / 32)).
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


def quantize_rows(x_MK: torch.Tensor, scaling: Scaling = "blockwise") -> Quantized:
    """Quantise each row in blocks of neighbours.

    Args:
        x_MK: (M, K) bfloat16, float16 or float32.
        scaling: which neighbours share a scale.

    Returns:
        values (M, K), scales (M, ceil(K / `block_width`)).
    """
    values_1MK, scales_1MB = _quantize(x_MK[None], 1, scaling)
    return Quantized(values_1MK[0], scales_1MB[0])


def quantize_weight(w_EMK: torch.Tensor, scaling: Scaling = "blockwise") -> Quantized:
    """Quantise the matrix of each expert for products that contract over K.

    Args:
        w_EMK: (E, M, K) bfloat16, float16 or float32.
        scaling: which values of a matrix share a scale: squares, rows, or blocks of a row.

    Returns:
        values (E, M, K), scales as of `QuantizedWeight.forward`.
    """
    return _quantize(w_EMK, block_height(scaling), scaling)


def quantize_weight_layouts(
    w_EMK: torch.Tensor, scaling: Scaling, *, forward: bool, backward: bool
) -> QuantizedWeight:
    """Quantise a weight for products with W.T (`forward`), with W (`backward`), or both."""
    transposed_EKM = w_EMK.transpose(1, 2).contiguous() if backward else None
    return QuantizedWeight(
        quantize_weight(w_EMK, scaling) if forward else None,
        None if transposed_EKM is None else quantize_weight(transposed_EKM, scaling),
    )


def dequantize(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return value * scale in float32, for rows and weights of every scaling.

    Args:
        values: (..., M, K) float8_e4m3fn.
        scales: (..., M or 1 or ceil(M / 128), K or 1 or ceil(K / 128)) float32, or
            (..., M, ceil(K / 32)) float8_e8m0fnu.
    """
    block = MX_BLOCK if scales.dtype == E8M0 else BLOCK
    scales = scales.float()
    for dim in (-2, -1):
        width = values.shape[dim]
        if scales.shape[dim] not in (1, width):
            scales = scales.repeat_interleave(block, dim).narrow(dim, 0, width)
    return values.float() * scales


def block_width(scaling: Scaling, depth: int) -> int:
    """Return how many neighbours along a contraction of `depth` share a scale."""
    return {"blockwise": BLOCK, "rowwise": depth, "mxfp8": MX_BLOCK}[scaling]


def block_height(scaling: Scaling) -> int:
    """Return how many rows of a weight share a scale."""
    return BLOCK if scaling == "blockwise" else 1


def scale_dtype(scaling: Scaling) -> torch.dtype:
    """Return the dtype of the scales."""
    return E8M0 if scaling == "mxfp8" else torch.float32


def _quantize(x_EMK: torch.Tensor, tall: int, scaling: Scaling) -> Quantized:
    experts, rows, width = x_EMK.shape
    wide = block_width(scaling, width)
    padded = F.pad(x_EMK.float().contiguous(), (0, -width % wide, 0, -rows % tall))
    tiles = padded.view(experts, padded.shape[1] // tall, tall, padded.shape[2] // wide, wide)
    largest = tiles.abs().amax(dim=(2, 4))  # NaN if any value is
    scales = _powers_of_two(largest) if scaling == "mxfp8" else _quotients(largest)
    values = (tiles / scales.float()[:, :, None, :, None]).to(E4M3).view(padded.shape)
    return Quantized(values[:, :rows, :width].contiguous(), scales)


def _quotients(largest: torch.Tensor) -> torch.Tensor:
    # Both bounds let NaN and infinity pass.
    return torch.where(largest == 0, 1.0, (largest / E4M3_MAX).clamp_min(_SMALLEST_SCALE))


def _powers_of_two(largest: torch.Tensor) -> torch.Tensor:
    fraction, exponent = torch.frexp(largest)  # 448 is 0.875 * 2^9
    exponent = (exponent - 9 + (fraction > 0.875)).clamp_min(-126)
    scales = torch.where(largest == 0, _E8M0_BIAS, exponent + _E8M0_BIAS)
    return torch.where(largest.isfinite(), scales, _E8M0_NAN).to(torch.uint8).view(E8M0)

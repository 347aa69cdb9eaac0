"""The definition of e4m3 with scales: rounding, edges of the format, non-finite values, blocks."""

import pytest
import torch

from monkey_patch.kernels.scatter_moe.quantize import (
    BLOCK,
    E4M3,
    E4M3_MAX,
    dequantize,
    quantize_rows,
    quantize_weight,
    quantize_weight_layouts,
)

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# All finite magnitudes of e4m3, in their order.
MAGNITUDES = torch.arange(127, dtype=torch.uint8).view(E4M3).float()


def bits(quantized):
    return quantized.view(torch.uint8)


def snr(actual, truth):
    """In decibels."""
    truth = truth.double()
    return 10 * torch.log10(truth.square().sum() / (actual.double() - truth).square().sum()).item()


def test_rounding_is_to_nearest_and_ties_to_even():
    """448 in the row makes the scale 1; then every value that e4m3 has, and every tie, is tried."""
    ties = (MAGNITUDES[1:] + MAGNITUDES[:-1]) / 2
    below, above = ties.nextafter(MAGNITUDES[:-1]), ties.nextafter(MAGNITUDES[1:])
    for values, expected in (
        (MAGNITUDES, torch.arange(127)),
        (ties, torch.arange(126) + torch.arange(126) % 2),
        (below, torch.arange(126)),
        (above, torch.arange(1, 127)),
    ):
        for sign, bit in ((1, 0), (-1, 128)):
            row = torch.cat([sign * values, torch.tensor([E4M3_MAX])])[None]
            q, scale = quantize_rows(row, block=128)
            assert scale.tolist() == [[1.0]]
            assert torch.equal(bits(q)[0, :-1].long(), expected + bit)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [BLOCK, None])
@pytest.mark.parametrize(("rows", "width"), [(5, 300), (1, 128), (3, 1), (2, 129), (0, 64)])
def test_rows_are_what_the_definition_says(rows, width, block, dtype):
    x = (torch.randn(rows, width) * torch.logspace(-3, 3, max(rows, 1))[:rows, None]).to(dtype)
    q, scales = quantize_rows(x, block)
    assert (q.dtype, scales.dtype) == (E4M3, torch.float32)
    assert (q.shape, scales.shape) == (x.shape, (rows, -(-width // (block or width))))
    for start, scale in zip(range(0, width, block or width), scales.T, strict=True):
        part = slice(start, start + (block or width))
        largest = x[:, part].float().abs().amax(dim=1)
        assert torch.equal(scale, largest / E4M3_MAX)
        assert torch.equal(bits(q[:, part]), bits((x[:, part].float() / scale[:, None]).to(E4M3)))
        assert (q[:, part].float().abs().amax(dim=1) == E4M3_MAX).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 200, 130), (1, 128, 256), (3, 1, 7)])
def test_weights_are_what_the_definition_says(shape, dtype):
    w = (torch.randn(shape) * torch.rand(shape).pow(4)).to(dtype)
    q, scales = quantize_weight(w)
    experts, rows, width = shape
    assert scales.shape == (experts, -(-rows // BLOCK), -(-width // BLOCK))
    for i, j in torch.cartesian_prod(*map(torch.arange, scales.shape[1:])).view(-1, 2).tolist():
        tile = w[:, i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK].float()
        assert torch.equal(scales[:, i, j], tile.abs().amax(dim=(1, 2)) / E4M3_MAX)
    by_column = scales.repeat_interleave(BLOCK, 2)[:, :, :width]
    each = by_column.repeat_interleave(BLOCK, 1)[:, :rows]
    assert torch.equal(bits(q), bits((w.float() / each).to(E4M3)))
    assert torch.equal(dequantize(q, scales), q.float() * each)


def test_rowwise_weights_have_one_scale_per_row_of_the_contraction():
    w = torch.randn(2, 60, 200)
    q, scales = quantize_weight(w, block=None)
    assert scales.shape == (2, 60, 1)
    assert torch.equal(scales[..., 0], w.abs().amax(dim=2) / E4M3_MAX)
    both = quantize_weight_layouts(w, None, forward=True, backward=True)
    assert torch.equal(bits(both.forward.values), bits(q))
    assert both.backward.scales.shape == (2, 200, 1)
    assert torch.equal(both.backward.scales[..., 0], w.abs().amax(dim=1) / E4M3_MAX)


def test_blockwise_a_weight_and_its_transpose_have_the_same_values():
    w = torch.randn(2, 200, 300)
    forward, backward = quantize_weight_layouts(w, BLOCK, forward=True, backward=True)
    assert torch.equal(bits(forward.values.transpose(1, 2)), bits(backward.values))
    assert torch.equal(forward.scales.transpose(1, 2), backward.scales)
    assert backward.values.is_contiguous()
    only = quantize_weight_layouts(w, BLOCK, forward=False, backward=True)
    assert only.forward is None
    assert torch.equal(bits(only.backward.values), bits(backward.values))


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_have_scale_one(dtype):
    for q, scales in (
        quantize_rows(torch.zeros(3, 200, dtype=dtype)),
        quantize_weight(torch.zeros(2, 140, 9, dtype=dtype)),
        quantize_rows(torch.zeros(3, 200, dtype=dtype), None),
    ):
        assert (scales == 1).all()
        assert (bits(q) == 0).all()
    # A block of zeros beside one that is none, and the sign of zero.
    x = torch.zeros(1, 256, dtype=dtype)
    x[0, 200], x[0, 3] = 5, -0.0
    q, scales = quantize_rows(x)
    assert scales.tolist() == [[1.0, torch.tensor(5 / E4M3_MAX, dtype=torch.float32).item()]]
    assert bits(q)[0, 3] == 128


@pytest.mark.parametrize("value", [2.0**-133, 3e-39, 2.0**-149, 5e-36])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_denormal_blocks_lose_precision_but_stay_what_they_are(value, dtype):
    x = (torch.randn(4, 128) * value).to(dtype)
    q, scales = quantize_rows(x)
    assert (scales >= 2.0**-126).all()
    back = dequantize(q, scales)
    assert torch.isfinite(back).all()
    assert ((back.double() - x.double()).abs() <= torch.maximum(
        x.double().abs() / 16, torch.tensor(2.0**-136, dtype=torch.float64)
    )).all()  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_number_does_not_overflow(dtype):
    largest = torch.finfo(dtype).max
    x = torch.tensor([[largest, -largest, largest / 3, 1.0]]).to(dtype)
    back = dequantize(*quantize_rows(x))
    assert torch.isfinite(back).all()
    assert torch.allclose(back[0, :3].double(), x[0, :3].double(), rtol=2**-4)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("block", [BLOCK, None])
@pytest.mark.parametrize("column", [0, 127, 128, 299])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_value_that_is_not_finite_makes_its_block_nan(dtype, column, block, bad):
    x = torch.randn(3, 300).to(dtype)
    x[1, column] = bad
    q, scales = quantize_rows(x, block)
    assert q[1, column].float().isnan(), "products see it whatever they do with the scale"
    start = column // BLOCK * BLOCK if block else 0
    expected = torch.zeros(3, 300, dtype=torch.bool)
    expected[1, start : start + (block or 300)] = True
    back = dequantize(q, scales)
    assert torch.equal(back.isnan(), expected)
    assert torch.isfinite(back[~expected]).all()
    w = x[None].expand(2, 3, 300).clone()
    w[1] = 1.0
    for quantized in (quantize_weight(w, block), quantize_weight(w.transpose(1, 2), block)):
        back = dequantize(*quantized)
        assert back[0].isnan().any()
        assert torch.isfinite(back[1]).all(), "the other expert"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [BLOCK, None])
@pytest.mark.parametrize("tail", ["gauss", "heavy"])
def test_noise(tail, block, dtype):
    """Between 1 and 2 a step is 1/8: noise (1/8)^2 / 12 against a mean square of 7/3, 32.5 dB.

    30 leaves room for how the values lie between powers of two.
    """
    x = torch.randn(256, 768)
    if tail == "heavy":
        x = torch.distributions.StudentT(torch.tensor(3.0)).sample((256, 768))
    x = x.to(dtype)
    assert snr(dequantize(*quantize_rows(x, block)), x) > 30
    assert snr(dequantize(*quantize_weight(x[None], block)), x[None]) > 30


@pytest.mark.parametrize("block", [BLOCK, None])
def test_strides_do_not_matter(block):
    w = torch.randn(2, 128, 256).transpose(1, 2)
    for a, b in zip(quantize_weight(w, block), quantize_weight(w.contiguous(), block), strict=True):
        assert torch.equal(a.float(), b.float())
        assert a.is_contiguous()


def test_two_runs_are_bit_equal():
    x = torch.randn(50, 300)
    (a, s), (b, t) = quantize_rows(x), quantize_rows(x)
    assert torch.equal(bits(a), bits(b))
    assert torch.equal(s, t)

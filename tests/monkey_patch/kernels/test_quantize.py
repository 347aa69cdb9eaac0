"""The definition of e4m3 with scales: rounding, edges of the format, non-finite values, blocks."""

import pytest
import torch

from monkey_patch.kernels.scatter_moe.quantize import (
    BLOCK,
    E4M3,
    E4M3_MAX,
    E8M0,
    MX_BLOCK,
    block_width,
    dequantize,
    quantize_rows,
    quantize_weight,
    quantize_weight_layouts,
)

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SCALINGS = ["blockwise", "rowwise", "mxfp8"]
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
            q, scale = quantize_rows(row)
            assert scale.tolist() == [[1.0]]
            assert torch.equal(bits(q)[0, :-1].long(), expected + bit)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scaling", SCALINGS[:2])
@pytest.mark.parametrize(("rows", "width"), [(5, 300), (1, 128), (3, 1), (2, 129), (0, 64)])
def test_rows_are_what_the_definition_says(rows, width, scaling, dtype):
    x = (torch.randn(rows, width) * torch.logspace(-3, 3, max(rows, 1))[:rows, None]).to(dtype)
    q, scales = quantize_rows(x, scaling)
    block = block_width(scaling, width)
    assert (q.dtype, scales.dtype) == (E4M3, torch.float32)
    assert (q.shape, scales.shape) == (x.shape, (rows, -(-width // block)))
    for start, scale in zip(range(0, width, block), scales.T, strict=True):
        part = slice(start, start + block)
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


def mx_scales(x):
    """The smallest powers of two with which the largest of 32 values is at most 448, by trying."""
    powers = 2.0 ** torch.arange(-126, 128, dtype=torch.float64)
    largest = x.double().abs().amax(dim=-1, keepdim=True)
    first = (largest <= 448 * powers).long().argmax(dim=-1)
    return torch.where(largest[..., 0] == 0, 1.0, powers[first])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(5, 300), (2, 32), (3, 1), (2, 33), (0, 64)])
def test_mxfp8_rows_are_what_the_definition_says(rows, width, dtype):
    x = (torch.randn(rows, width) * torch.logspace(-3, 3, max(rows, 1))[:rows, None]).to(dtype)
    q, scales = quantize_rows(x, "mxfp8")
    assert (q.dtype, scales.dtype) == (E4M3, E8M0)
    assert (q.shape, scales.shape) == (x.shape, (rows, -(-width // MX_BLOCK)))
    for start, scale in zip(range(0, width, MX_BLOCK), scales.float().T, strict=True):
        part = slice(start, start + MX_BLOCK)
        assert torch.equal(scale.double(), mx_scales(x[:, part]))
        assert torch.equal(bits(q[:, part]), bits((x[:, part].float() / scale[:, None]).to(E4M3)))


def test_mxfp8_rounds_the_power_of_two_up():
    """Every magnitude where the power changes, and its neighbours; nothing saturates."""
    for power in (-100, -3, 0, 9, 100):
        edge = torch.tensor([448.0 * 2.0**power])
        below, above = edge.nextafter(torch.zeros(1)), edge.nextafter(torch.full((1,), torch.inf))
        for x, expected in ((below, power), (edge, power), (above, power + 1)):
            q, scales = quantize_rows(x[None], "mxfp8")
            assert scales.float().log2().item() == expected
            assert q.float().item() == (448.0 if expected == power else 224.0)


def test_mxfp8_weights_are_blocks_along_the_contraction_of_either_product():
    w = torch.randn(2, 70, 200)
    w[:, 3] *= 1e3
    forward, backward = quantize_weight_layouts(w, "mxfp8", forward=True, backward=True)
    for got, expected in ((forward, w), (backward, w.mT)):
        shape = expected.shape
        values, scales = quantize_rows(expected.reshape(-1, shape[-1]), "mxfp8")
        assert torch.equal(bits(got.values).flatten(), bits(values).flatten())
        assert torch.equal(bits(got.scales).view(-1, scales.shape[1]), bits(scales))
        assert torch.equal(dequantize(*got), dequantize(values, scales).view(shape))
    differs = dequantize(*forward) != dequantize(*backward).mT
    assert differs[:, :32].any(), "what is denormal beside the large row"
    assert not differs[:, 32:].all()


def floor_scaled(x):
    """The specification's power of two, 2^(floor(log2 largest) - 8), with saturation."""
    blocks = x.float().unflatten(-1, (-1, MX_BLOCK))
    exponent = torch.frexp(blocks.abs().amax(dim=-1, keepdim=True)).exponent - 1
    scales = 2.0 ** (exponent - 8)
    return ((blocks / scales).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3).float() * scales).flatten(-2)


@pytest.mark.parametrize("tail", ["gauss", "lognormal"])
def test_mxfp8_rounded_up_has_less_noise_than_rounded_down(tail):
    """Why it is rounded up: 28.5 against 27.6 dB of a product, 28.3 against 26.1."""
    x, w = torch.randn(512, 768), torch.randn(512, 768)
    if tail == "lognormal":
        x = x * torch.randn(512, 768).mul(2).exp()
    truth = x.double() @ w.double().T
    ours = [dequantize(*quantize_rows(t, "mxfp8")) for t in (x, w)]
    up = snr(ours[0] @ ours[1].T, truth)
    down = snr(floor_scaled(x) @ floor_scaled(w).T, truth)
    assert up > 27.8
    assert up > down + 0.6


def test_rowwise_weights_have_one_scale_per_row_of_the_contraction():
    w = torch.randn(2, 60, 200)
    q, scales = quantize_weight(w, "rowwise")
    assert scales.shape == (2, 60, 1)
    assert torch.equal(scales[..., 0], w.abs().amax(dim=2) / E4M3_MAX)
    both = quantize_weight_layouts(w, "rowwise", forward=True, backward=True)
    assert torch.equal(bits(both.forward.values), bits(q))
    assert both.backward.scales.shape == (2, 200, 1)
    assert torch.equal(both.backward.scales[..., 0], w.abs().amax(dim=1) / E4M3_MAX)


def test_blockwise_a_weight_and_its_transpose_have_the_same_values():
    w = torch.randn(2, 200, 300)
    forward, backward = quantize_weight_layouts(w, "blockwise", forward=True, backward=True)
    assert torch.equal(bits(forward.values.transpose(1, 2)), bits(backward.values))
    assert torch.equal(forward.scales.transpose(1, 2), backward.scales)
    assert backward.values.is_contiguous()
    only = quantize_weight_layouts(w, "blockwise", forward=False, backward=True)
    assert only.forward is None
    assert torch.equal(bits(only.backward.values), bits(backward.values))


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_have_scale_one(dtype):
    for q, scales in (
        quantize_rows(torch.zeros(3, 200, dtype=dtype)),
        quantize_weight(torch.zeros(2, 140, 9, dtype=dtype)),
        quantize_rows(torch.zeros(3, 200, dtype=dtype), "rowwise"),
        quantize_rows(torch.zeros(3, 200, dtype=dtype), "mxfp8"),
        quantize_weight(torch.zeros(2, 140, 9, dtype=dtype), "mxfp8"),
    ):
        assert (scales.float() == 1).all()
        assert (bits(q) == 0).all()
    # A block of zeros beside one that is none, and the sign of zero.
    x = torch.zeros(1, 256, dtype=dtype)
    x[0, 200], x[0, 3] = 5, -0.0
    q, scales = quantize_rows(x)
    assert scales.tolist() == [[1.0, torch.tensor(5 / E4M3_MAX, dtype=torch.float32).item()]]
    assert bits(q)[0, 3] == 128


@pytest.mark.parametrize("scaling", ["blockwise", "mxfp8"])
@pytest.mark.parametrize("value", [2.0**-133, 3e-39, 2.0**-149, 5e-36])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_denormal_blocks_lose_precision_but_stay_what_they_are(value, dtype, scaling):
    x = (torch.randn(4, 128) * value).to(dtype)
    q, scales = quantize_rows(x, scaling)
    assert (scales.float() >= 2.0**-126).all()
    back = dequantize(q, scales)
    assert torch.isfinite(back).all()
    assert ((back.double() - x.double()).abs() <= torch.maximum(
        x.double().abs() / 16, torch.tensor(2.0**-136, dtype=torch.float64)
    )).all()  # fmt: skip


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_number_does_not_overflow(dtype, scaling):
    largest = torch.finfo(dtype).max
    if scaling == "mxfp8":  # what rounds to 2^128 is infinite in float32
        largest = min(largest, 1.9 * 2.0**127)
    x = torch.tensor([[largest, -largest, largest / 3, 1.0]]).to(dtype)
    back = dequantize(*quantize_rows(x, scaling))
    assert torch.isfinite(back).all()
    assert torch.allclose(back[0, :3].double(), x[0, :3].double(), rtol=2**-4)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("column", [0, 127, 128, 299])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_value_that_is_not_finite_makes_its_block_nan(dtype, column, scaling, bad):
    x = torch.randn(3, 300).to(dtype)
    x[1, column] = bad
    q, scales = quantize_rows(x, scaling)
    assert q[1, column].float().isnan(), "products see it whatever they do with the scale"
    block = block_width(scaling, 300)
    start = column // block * block
    expected = torch.zeros(3, 300, dtype=torch.bool)
    expected[1, start : start + block] = True
    back = dequantize(q, scales)
    assert torch.equal(back.isnan(), expected)
    assert torch.isfinite(back[~expected]).all()
    w = x[None].expand(2, 3, 300).clone()
    w[1] = 1.0
    for quantized in (quantize_weight(w, scaling), quantize_weight(w.mT, scaling)):
        back = dequantize(*quantized)
        assert back[0].isnan().any()
        assert torch.isfinite(back[1]).all(), "the other expert"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("tail", ["gauss", "heavy"])
def test_noise(tail, scaling, dtype):
    """Between 1 and 2 a step is 1/8: noise (1/8)^2 / 12 against a mean square of 7/3, 32.5 dB.

    30 leaves room for how the values lie between powers of two.
    """
    x = torch.randn(256, 768)
    if tail == "heavy":
        x = torch.distributions.StudentT(torch.tensor(3.0)).sample((256, 768))
    x = x.to(dtype)
    assert snr(dequantize(*quantize_rows(x, scaling)), x) > 30
    assert snr(dequantize(*quantize_weight(x[None], scaling)), x[None]) > 30


@pytest.mark.parametrize("scaling", SCALINGS)
def test_strides_do_not_matter(scaling):
    w = torch.randn(2, 128, 256).transpose(1, 2)
    found, expected = (quantize_weight(t, scaling) for t in (w, w.contiguous()))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.float(), b.float())
        assert a.is_contiguous()


def test_two_runs_are_bit_equal():
    x = torch.randn(50, 300)
    (a, s), (b, t) = quantize_rows(x), quantize_rows(x)
    assert torch.equal(bits(a), bits(b))
    assert torch.equal(s, t)

"""The FP8 kernels beyond 2**31 values, where 32-bit offsets would wrap."""

from dataclasses import replace

import pytest
import torch

from monkey_patch.kernels.scatter_moe.quantize import (
    BLOCK,
    E4M3,
    Quantized,
    QuantizedRows,
    dequantize,
    quantize_rows,
    quantize_weight_layouts,
)
from monkey_patch.kernels.scatter_moe.triton.fp8.activation_gradient import (
    fp8_activation_gradient_launch,
)
from monkey_patch.kernels.scatter_moe.triton.fp8.product import fp8_product_launch
from monkey_patch.kernels.scatter_moe.triton.fp8.up import fp8_up_launch
from tests.monkey_patch.kernels.fp8_cases import CUT, assert_same_bits
from tests.support.interpreter import use_kernels
from tests.support.oracle import assert_close

pytestmark = pytest.mark.kernel


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    use_kernels(monkeypatch)


def far_rows(width):
    """Rows beyond 2**31 values; pages that nobody touches cost nothing."""
    rows = 2**31 // width + 64
    values = torch.empty(rows, width, dtype=E4M3)
    return QuantizedRows(values, torch.empty(rows, width // BLOCK), torch.float32), rows - 32


def fill(rows, start, count):
    values, scales = quantize_rows(torch.randn(count, rows.values.shape[1]))
    rows.values[start : start + count], rows.scales[start : start + count] = values, scales
    return dequantize(values, scales).double()


def weight_of(rows, depth):
    values, scales = quantize_weight_layouts(
        torch.randn(1, rows, depth), "blockwise", forward=True, backward=False
    ).forward
    return Quantized(values, scales), dequantize(values, scales)[0].double()


def test_rows_beyond_two_billion_values():
    rows, far = far_rows(2048)
    truth = fill(rows, far, 8)
    weight, w = weight_of(64, 2048)
    tiles = torch.tensor([[0], [far], [far + 8]], dtype=torch.int32)
    for tma in (True, False):
        out, cut = torch.empty(len(rows.values), 64), replace(CUT, tma=tma)
        fp8_product_launch(rows, weight, out, tiles, cut, scaling="blockwise").run()
        assert_close(out[far : far + 8], truth @ w.T)

    slot = torch.tensor([far], dtype=torch.int32)
    hidden, tiles = torch.empty(1, 64), torch.tensor([[0], [0], [1]], dtype=torch.int32)
    fp8_up_launch(rows, weight, hidden, None, slot, tiles, 1, CUT, scaling="blockwise").run()
    assert_close(hidden, truth[:1] @ w.T)


def test_results_beyond_two_billion_values():
    width, count = 1024, 8
    quantized, far = far_rows(2 * width)
    act, _ = far_rows(width)
    num_slots, rows = len(act.values), slice(far, far + count)
    slots = torch.zeros(num_slots, dtype=torch.int32)
    slots[rows] = torch.arange(count, dtype=torch.int32)
    tiles = torch.tensor([[0], [far], [far + count]], dtype=torch.int32)
    x = QuantizedRows(*quantize_rows(torch.randn(count, 32)), torch.float16)
    gate_up, w = weight_of(2 * width, 32)
    hidden = torch.empty(num_slots, 2 * width, dtype=torch.float16)
    fp8_up_launch(x, gate_up, hidden, act, slots, tiles, 1, CUT, scaling="blockwise").run()
    assert_close(hidden[rows], dequantize(*x[:2]).double() @ w.T)
    gate, up = hidden[rows].double().chunk(2, dim=-1)
    truth = torch.nn.functional.silu(gate) * up
    assert_close(dequantize(act.values[rows], act.scales[rows]), truth, rms=0.04)

    down, _ = weight_of(width, 32)
    d_hidden, partial_sums = torch.empty_like(hidden), torch.empty(8, num_slots)
    fp8_activation_gradient_launch(
        x, down, hidden, torch.ones(count, 1), d_hidden, quantized, None, partial_sums, slots,
        tiles, CUT, scaling="blockwise",
    ).run()  # fmt: skip
    got = Quantized(quantized.values[rows], quantized.scales[rows])
    assert_same_bits(got, quantize_rows(d_hidden[rows]))
    assert d_hidden[rows].isfinite().all()

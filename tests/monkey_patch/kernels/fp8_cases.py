"""What the tests of FP8 share: cases, the definition under autograd, what compares and counts."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from monkey_patch.kernels.scatter_moe.quantize import (
    E4M3,
    E8M0,
    dequantize,
    quantize_rows,
    quantize_weight,
)
from monkey_patch.kernels.scatter_moe.triton.tiles import Tiles

CUT = Tiles(block_m=32, block_n=128, block_k=128, num_warps=4, num_stages=1, tma=True)


def assert_same_bits(got, expected):
    """Values and scales; a NaN may have any bits."""
    for a, e in zip(got[:2], expected[:2], strict=True):
        assert (a.dtype, a.shape) == (e.dtype, e.shape)
        whole_number = torch.uint8 if a.dtype in (E4M3, E8M0) else torch.int32
        is_nan = e.float().isnan()
        assert torch.equal(a.float().isnan(), is_nan)
        assert torch.equal(a.view(whole_number)[~is_nan], e.view(whole_number)[~is_nan])


def edges(rows, width, dtype):
    """Rows of all magnitudes, with ties of e4m3, zeros, denormals and what is not finite."""
    x = torch.randn(rows, width) * torch.logspace(-30, 4, rows)[:, None]
    ties = torch.arange(width) % 240 / 8 + 2**-5
    special = [ties, ties * 0, ties * 1e-39, ties * 1e-41, -ties, ties * 2**-9]
    for place, row in enumerate(special):
        x[place] = row
    x[0, 0], x[4, 0], x[5, 0] = 448.0, 448.0, 448.0
    x[6, width // 2], x[7, -1], x[8, 0] = torch.inf, torch.nan, -torch.inf
    return x.to(dtype)


class Fp8Linear(torch.autograd.Function):
    """x @ w.T of one expert in FP8, the gradient of w in full."""

    @staticmethod
    def forward(ctx, x, w, scaling):
        ctx.save_for_backward(x, w)
        ctx.scaling = scaling
        weight = dequantize(*quantize_weight(w[None], scaling))[0]
        return dequantize(*quantize_rows(x, scaling)) @ weight.T

    @staticmethod
    def backward(ctx, d_y):
        x, w = ctx.saved_tensors
        weight = dequantize(*quantize_weight(w.T[None], ctx.scaling))[0]
        return dequantize(*quantize_rows(d_y, ctx.scaling)) @ weight.T, d_y.T @ x, None


class Fp8Down(torch.autograd.Function):
    """s * (act @ w.T); what is quantised is act and d_out, the routing weight s is not in it."""

    @staticmethod
    def forward(ctx, act, w, s, scaling):
        ctx.save_for_backward(act, w, s)
        ctx.scaling = scaling
        weight = dequantize(*quantize_weight(w[None], scaling))[0]
        return dequantize(*quantize_rows(act, scaling)) @ weight.T * s[:, None]

    @staticmethod
    def backward(ctx, d_out):
        act, w, s = ctx.saved_tensors
        weight = dequantize(*quantize_weight(w.T[None], ctx.scaling))[0]
        g = dequantize(*quantize_rows(d_out, ctx.scaling)) @ weight.T
        return g * s[:, None], d_out.T @ (act * s[:, None]), (g * act).sum(dim=1), None


def fp8_reference(x, gate_up, down, index, weights, scaling):
    """The definition, expert by expert, in float32."""
    out = torch.zeros_like(x)
    for e in range(len(down)):
        token, k = (index == e).nonzero(as_tuple=True)
        gate, up = Fp8Linear.apply(x[token], gate_up[e], scaling).chunk(2, dim=-1)
        act = torch.nn.functional.silu(gate) * up
        out = out.index_add(0, token, Fp8Down.apply(act, down[e], weights[token, k], scaling))
    return out


class Products(TorchDispatchMode):
    """Counts products and keeps the shapes of their operands; torchao's FP8 tensors are seen."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.default:
            is_fp8 = type(args[0]).__name__ == "Float8TrainingTensor"
            self.shapes.append((is_fp8, tuple(args[0].shape), tuple(args[1].shape)))
        return func(*args, **(kwargs or {}))

"""Inputs of an expert block, and a run of it with every gradient."""

import torch

NAMES = ("x", "gate_up_proj", "down_proj", "top_k_weights")


def make_inputs(T=37, E=8, K=2, D=48, F=32, dtype=torch.float32, index=None):
    """Return [x, gate_up_proj, down_proj, top_k_weights] and the index."""
    index = torch.rand(T, E).argsort(dim=1)[:, :K] if index is None else index
    shapes = ((T, D), (E, 2 * F, D), (E, D, F), (T, K))
    scale = (1.0, D**-0.5, F**-0.5, 1.0)
    tensors = [(torch.randn(s) * c).to(dtype) for s, c in zip(shapes, scale, strict=True)]
    return tensors, index


def run_with_gradients(function, tensors, index, dtype=None):
    """Return the output and the gradients of a fixed direction, in `dtype` if given."""
    x, gate_up, down, weights = leaves = [
        t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors
    ]
    out = function(x, gate_up, down, index, weights)
    direction = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
    out.backward(direction.to(out.dtype))
    return [out, *(leaf.grad for leaf in leaves)]

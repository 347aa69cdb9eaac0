"""What every implementation in the race computes: shapes, inputs, and the right answer.

Shape letters as in the kernels: T tokens, K experts per token, E experts, D hidden, F expert
intermediate.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

# Allowed RMS(error) / RMS(reference), as in tests/support/oracle.py; the dtype of the reference.
LIMITS = {torch.bfloat16: 2e-2, torch.float32: 5e-6}
REFERENCE_DTYPE = {torch.bfloat16: torch.float32, torch.float32: torch.float64}


@dataclass(frozen=True)
class Case:
    """One shape with one kind of routing; Qwen3-30B-A3B's layer unless told otherwise.

    Attributes:
        tokens: T.
        routing: `uniform`, or `zipf`: the expert of rank r is drawn with a weight of 1 / r.
        device: `cuda` or `cpu`.
        dtype: of the activations, both weights and the routing weights.
        hidden: D.
        intermediate: F.
        experts: E.
        top_k: K.
    """

    tokens: int
    routing: str
    device: str = "cuda"
    dtype: str = "bfloat16"
    hidden: int = 2048
    intermediate: int = 768
    experts: int = 128
    top_k: int = 8

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype by its object."""
        return getattr(torch, self.dtype)

    @property
    def product_flops(self) -> int:
        """Floating-point operations of one (T * K, D) x (D, F) product; a forward has three."""
        return 2 * self.tokens * self.top_k * self.hidden * self.intermediate

    def as_json(self) -> dict[str, Any]:
        """Return the fields."""
        return asdict(self)


def cpu_case(tokens: int, routing: str) -> Case:
    """Return a shape that a CPU computes in milliseconds, in float32.

    bf16 would measure the backward of `F.grouped_mm`, which is very slow on a CPU.
    """
    sizes = {"hidden": 128, "intermediate": 96, "experts": 16, "top_k": 4}
    return Case(tokens, routing, device="cpu", dtype="float32", **sizes)


class Inputs(NamedTuple):
    """The arguments of the op, then the gradient of its output.

    Attributes:
        x: (T, D).
        gate_up_proj: (E, 2F, D).
        down_proj: (E, D, F).
        top_k_index: (T, K) int64.
        top_k_weights: (T, K).
        grad: (T, D).
    """

    x: torch.Tensor
    gate_up_proj: torch.Tensor
    down_proj: torch.Tensor
    top_k_index: torch.Tensor
    top_k_weights: torch.Tensor
    grad: torch.Tensor

    @property
    def arguments(self) -> tuple[torch.Tensor, ...]:
        """What the op takes."""
        return tuple(self)[:5]

    @property
    def leaves(self) -> tuple[torch.Tensor, ...]:
        """The arguments that get a gradient."""
        return (self.x, self.gate_up_proj, self.down_proj, self.top_k_weights)


RESULTS = ("out", "grad x", "grad gate_up_proj", "grad down_proj", "grad top_k_weights")


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Draw inputs whose activations have the size of a trained layer's, around 1.

    Every implementation gets the same numbers, the index as torch.topk gives it (int64).
    """
    generator = torch.Generator(case.device).manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        drawn = torch.randn(shape, generator=generator, device=case.device, dtype=case.torch_dtype)
        return drawn.mul_(scale)

    tokens, hidden, width, experts = case.tokens, case.hidden, case.intermediate, case.experts
    logits_TK = draw(tokens, case.top_k)
    return Inputs(
        x=draw(tokens, hidden).requires_grad_(),
        gate_up_proj=_parameter(draw(experts, 2 * width, hidden, scale=hidden**-0.5)),
        down_proj=_parameter(draw(experts, hidden, width, scale=width**-0.5)),
        top_k_index=_route(case, generator),
        top_k_weights=logits_TK.softmax(dim=-1).requires_grad_(),
        grad=draw(tokens, hidden),
    )


def _parameter(tensor: torch.Tensor) -> torch.Tensor:
    return torch.nn.Parameter(tensor)  # a module takes nothing else as its weight


def _route(case: Case, generator: torch.Generator) -> torch.Tensor:
    """Draw K different experts per token; (T, K) int64."""
    device, experts = case.device, case.experts
    weights_E = torch.ones(experts, device=device)
    if case.routing == "zipf":
        ranks_E = torch.randperm(experts, generator=generator, device=device) + 1
        weights_E = 1.0 / ranks_E
    shape = (case.tokens, experts)
    # The K largest of log weight + Gumbel noise are a draw without replacement.
    noise_TE = torch.empty(shape, device=device).exponential_(generator=generator).log_().neg_()
    return (weights_E.log() + noise_TE).topk(case.top_k, dim=-1).indices


def reference(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """Return `RESULTS` computed expert by expert with autograd, in a wider dtype.

    All tokens are computed: at T = 32,768 this takes some 5 GiB beside the inputs.
    """
    index_TK, dtype = inputs.top_k_index, REFERENCE_DTYPE[inputs.x.dtype]
    out_TD, *grads = (
        torch.zeros_like(t, dtype=dtype, requires_grad=False) for t in (inputs.grad, *inputs.leaves)
    )
    for expert in range(len(inputs.down_proj)):
        token, slot = (index_TK == expert).nonzero(as_tuple=True)
        with torch.no_grad():
            parts = (
                inputs.x[token],
                inputs.gate_up_proj[expert],
                inputs.down_proj[expert],
                inputs.top_k_weights[token, slot],
            )
        leaves = [part.to(dtype).requires_grad_() for part in parts]
        rows, gate_up, down, weight = leaves
        gate, up = F.linear(rows, gate_up).chunk(2, dim=-1)
        y = weight[:, None] * F.linear(F.silu(gate) * up, down)
        found = torch.autograd.grad(y, leaves, inputs.grad[token].to(dtype))
        out_TD.index_add_(0, token, y.detach())
        grads[0].index_add_(0, token, found[0])
        grads[1][expert], grads[2][expert] = found[1], found[2]
        grads[3][token, slot] = found[3]
    return (out_TD, *grads)


def rms_ratio(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return RMS(actual - expected) / RMS(expected), NaN if either holds one.

    Raises:
        ValueError: the shapes differ.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    error, norm = 0.0, 0.0
    # In blocks: a float32 copy of a whole weight gradient would take 1.6 GB.
    blocks = (tensor.flatten().split(1 << 26) for tensor in (actual, expected))
    for part, truth in zip(*blocks, strict=True):
        error += (part.to(truth.dtype) - truth).square_().sum(dtype=torch.float64).item()
        norm += truth.square().sum(dtype=torch.float64).item()
    return (error / max(norm, 1e-300)) ** 0.5

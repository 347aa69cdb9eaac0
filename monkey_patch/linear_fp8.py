"""Compute linear layers of the decoder in FP8, forward and backward, through torchao's casts.

The three products of an nn.Linear (output, gradient of the input, gradient of the weight) take
operands in FP8 that are cast on the fly, each with scales of its own, and accumulate in float32.
The layer stays what it is: its Parameter in its dtype, its name, its hooks; only `forward` of the
instance changes. torchao's own Float8Linear computes the same bits, but is another module, and
saves the weight's transpose for the backward pass, a view that keeps a gathered weight alive.

Signal to noise in dB, RMS(float64 result) over RMS(error) of output, gradient of the input and
gradient of the weight: the lowest of 10 seeds for float32 and T, D, F = 512, 512, 256, emulated on
a CPU; input and gradient of the output normal, or of Student's t with 2 degrees of freedom:

    recipe               normal                heavy-tailed
    rowwise              28.5  28.5   28.4     27.1  28.2   24.5
    tensorwise           28.5  24.5   24.5     28.3  24.7   24.4
    rowwise_with_gw_hp   28.5  28.5  132.3     27.1  28.2  131.2

The casts are elementwise passes over every operand: without torch.compile, which fuses them, they
cost more than the faster products bring.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import nn

from monkey_patch.compiled import compiled
from monkey_patch.core import Patch, PatchError, Replacement
from monkey_patch.fp8_selection import select
from monkey_patch.kernels.fp8_device import fp8_problem

if TYPE_CHECKING:
    from torchao.float8.config import CastConfig, Float8LinearConfig
    from torchao.float8.float8_training_tensor import LinearMMConfig

NAME = "linear_fp8"
Recipe = Literal["rowwise", "tensorwise", "rowwise_with_gw_hp"]

_ROWS = 16  # the contraction of _scaled_mm is a multiple of it


class Scaling(NamedTuple):
    """What is cast to which type with which scales, and the options of the three products."""

    config: Float8LinearConfig
    on_device: LinearMMConfig
    emulated: LinearMMConfig


class Fp8Forward:
    """A linear layer's forward in FP8; its bound method becomes an attribute of the layer.

    The weight is looked up at each call, when FSDP2 and ZeRO-3 have gathered it.
    """

    def __init__(self, linear: nn.Linear, scaling: Scaling):
        self.linear = linear
        self.scaling = scaling

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return (..., F) for (..., D), in the dtype of `input` or autocast's."""
        compute = fp8_linear
        if input.is_cuda and not torch.compiler.is_compiling():
            compute = _compiled()
        return compute(input, self.linear.weight, self.linear.bias, self.scaling)


@cache
def _compiled() -> Callable[..., torch.Tensor]:
    """Return `fp8_linear` compiled: eagerly, each cast is three passes over its operand.

    One function for all layers and engines: inside FSDP2's and ZeRO-3's hooks it sees plain
    tensors. Four shapes of a layer, with and without gradients, are a graph each.
    """
    return compiled(fp8_linear, max_graphs=64, fullgraph=True)


def fp8_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, scaling: Scaling
) -> torch.Tensor:
    """Return x weight^T + bias with operands in FP8; on a CPU the products are emulated.

    Rows of zeros give zeros. A row with an infinity or NaN gives NaN throughout, and so does its
    part of the gradients, or all of it where one scale serves the whole tensor.

    Args:
        x: (..., D) bf16, fp16 or fp32; any number of rows. Cast to autocast's dtype first.
        weight: (F, D), D and F multiples of 16; cast to the dtype of `x` before it is cast to FP8,
            so that float32 weights under autocast give what bfloat16 weights give. Saved itself
            for the backward pass; its gradient comes in its own dtype.
        bias: (F,), added after the product.
        scaling: of `make_scaling`.

    Raises:
        PatchError: on a device without FP8.
        ValueError: dtypes that differ outside of autocast.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    elif x.dtype != weight.dtype:
        raise ValueError(
            f"input is {x.dtype} and weight {weight.dtype}; cast one or run under torch.autocast"
        )
    if not torch.compiler.is_compiling():
        _check_device(x.device)
    if x.numel() == 0:
        return F.linear(x, weight.to(x.dtype), bias)
    with torch.autocast(device, enabled=False):
        out: torch.Tensor = _Linear.apply(x, weight, scaling)  # pyrefly: ignore
    return out if bias is None else out + bias.to(out.dtype)


class _Linear(torch.autograd.Function):
    """torchao's matmul_with_hp_or_float8_args (0.18), saving x and the weight themselves."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, scaling: Scaling) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.scaling = scaling
        config, to_fp8 = scaling.config, _casts(x, scaling)
        rows = to_fp8(x.reshape(-1, x.shape[-1]), config.cast_config_input, "input", -1)
        columns = to_fp8(weight.to(x.dtype).t(), config.cast_config_weight, "weight", 0)
        return torch.mm(rows, columns).reshape(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *d_outs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (d_out,), (x, weight) = d_outs, ctx.saved_tensors
        d_rows = d_out.reshape(-1, d_out.shape[-1])
        d_x = d_weight = None
        if ctx.needs_input_grad[0]:
            d_x = _input_gradient(d_rows, weight.to(x.dtype), ctx.scaling).reshape(x.shape)
        if ctx.needs_input_grad[1]:
            rows = x.reshape(-1, x.shape[-1])
            d_weight = _weight_gradient(d_rows, rows, ctx.scaling).to(weight.dtype)
        return d_x, d_weight, None


def _input_gradient(d_rows: torch.Tensor, weight: torch.Tensor, scaling: Scaling) -> torch.Tensor:
    config, to_fp8 = scaling.config, _casts(d_rows, scaling)
    rows = to_fp8(d_rows, config.cast_config_grad_output, "grad_output", -1)
    columns = to_fp8(weight.t(), config.cast_config_weight_for_grad_input, "weight", -1)
    return torch.mm(rows, columns.t())


def _weight_gradient(d_rows: torch.Tensor, rows: torch.Tensor, scaling: Scaling) -> torch.Tensor:
    config, to_fp8 = scaling.config, _casts(d_rows, scaling)
    if missing := -len(rows) % _ROWS:
        # Rows of zeros add nothing and are no row's maximum.
        d_rows, rows = (F.pad(t, (0, 0, 0, missing)) for t in (d_rows, rows))
    left = to_fp8(d_rows, config.cast_config_grad_output_for_grad_weight, "grad_output", 0)
    right = to_fp8(rows, config.cast_config_input_for_grad_weight, "input", 0)
    return torch.mm(left.t(), right)


def _casts(like: torch.Tensor, scaling: Scaling) -> partial[torch.Tensor]:
    options = scaling.emulated if like.device.type == "cpu" else scaling.on_device
    return partial(_cast, options, scaling.config.round_scales_to_power_of_2)


def _cast(
    options: LinearMMConfig,
    powers_of_2: bool,
    tensor: torch.Tensor,
    cast: CastConfig,
    role: str,
    dim: int,
) -> torch.Tensor:
    """Return `tensor` in FP8 with one scale for all or one along each `dim`, or as it is."""
    from torchao.float8.config import ScalingType
    from torchao.float8.float8_scaling_utils import (
        get_maybe_axiswise_dim,
        hp_tensor_to_float8_dynamic,
    )
    from torchao.float8.float8_training_tensor import GemmInputRole

    if cast.scaling_type is ScalingType.DISABLED or cast.target_dtype is None:
        return tensor
    return hp_tensor_to_float8_dynamic(
        tensor,
        cast.target_dtype,
        options,
        gemm_input_role=GemmInputRole(role),
        scaling_granularity=cast.scaling_granularity,
        axiswise_dim=get_maybe_axiswise_dim(dim, cast.scaling_granularity),
        round_scales_to_power_of_2=powers_of_2,
    )


def make_scaling(recipe: Recipe = "rowwise") -> Scaling:
    """Return torchao's recipe of that name.

    `rowwise`: e4m3, a scale per row or column, a power of two. `tensorwise`: one scale per tensor,
    gradients in e5m2. `rowwise_with_gw_hp`: `rowwise`, with the gradient of the weight computed in
    the dtype of the input.

    Raises:
        PatchError: an unknown recipe.
    """
    from torchao.float8.config import Float8LinearConfig
    from torchao.float8.float8_training_tensor import LinearMMConfig, ScaledMMConfig

    if recipe not in get_args(Recipe):
        raise PatchError(f"unknown FP8 recipe {recipe!r}; there are {', '.join(get_args(Recipe))}")
    config = Float8LinearConfig.from_recipe_name(recipe)
    products = (
        config.gemm_config_output, config.gemm_config_grad_input, config.gemm_config_grad_weight
    )  # fmt: skip
    on_device, emulated = (
        LinearMMConfig(*(ScaledMMConfig(emulate, p.use_fast_accum) for p in products))
        for emulate in (False, True)
    )
    return Scaling(config, on_device, emulated)


def _check_device(device: torch.device) -> None:
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    if problem := fp8_problem(device.type, capability):
        raise PatchError(f"patch {NAME!r}: {problem}")


def plan(model: nn.Module, keep: Sequence[str], recipe: Recipe) -> Iterator[Replacement]:
    """Yield the forward of every linear layer that `fp8_selection.select` converts."""
    scaling = make_scaling(recipe)
    for name in select(model, attention=True, experts=False, keep=keep).converted:
        linear: Any = model.get_submodule(name)
        _check_device(linear.weight.device)
        yield Replacement(linear, "forward", Fp8Forward(linear, scaling).forward, name)


def linear_fp8(keep: Sequence[str] = (), recipe: Recipe = "rowwise") -> Patch:
    """Return the patch that computes the decoder's linear layers in FP8.

    Args:
        keep: patterns of module names that stay as they are, as in `fp8_selection.select`.
        recipe: as in `make_scaling`.
    """
    return replace(LINEAR_FP8, plan=partial(plan, keep=tuple(keep), recipe=recipe))


LINEAR_FP8 = Patch(
    name=NAME,
    summary="attention's projections and dense MLPs in FP8 through torchao's casts",
    # Inductor of torch 2.14 miscompiles FP8 stores (triton-lang/triton#11111); torchao's remedy
    # changes inductor for the whole process, which no patch does.
    requires=("transformers>=5.23,<6", "torch>=2.10,<2.14", "torchao>=0.18,<0.19"),
    plan=partial(plan, keep=(), recipe="rowwise"),
    # Of the tests' 3-layer model: 0.03 for logits, 0.18 for gradients, 0.47 for a router's, where
    # few tokens are close to a tie and one visits another expert.
    tolerance=0.6,
    upstream="torchao.float8.float8_linear.matmul_with_hp_or_float8_args",
)

"""One parameter's step of transformers' Adafactor in slices, rounded stochastically to bf16.

Transformers' own step makes several float32 tensors of the size of the parameter, 1.6 GB each for
an expert tensor of Qwen3-30B-A3B, and rounds to nearest, where most updates to bf16 weights are
lost. This is the same rule on the same state in three passes over slices: statistics, the size of
the update, the update. Only the order of summation differs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.optimization import Adafactor

from monkey_patch.compiled import compiled
from qwen3_sft.optimizers.loaded_states import keep_float32_states
from qwen3_sft.optimizers.low_bit_step import MAX_GRAPHS, Clip

# Elements of a slice; at least one row of one matrix.
SLICE = 1 << 20
_COMPILED_SLICE = 1 << 26
_ADAFACTORS = {
    ("transformers.optimization", "Adafactor"),
    ("qwen3_sft.optimizers.adafactor", "SlicedAdafactor"),
}


def is_sliceable(optimizer: Any) -> bool:
    """Tell whether it is transformers' Adafactor as the Trainer makes it: own lr, no momentum."""
    kind = (type(optimizer).__module__, type(optimizer).__name__)
    return kind in _ADAFACTORS and not any(
        optimizer.defaults[name] for name in ("beta1", "relative_step", "scale_parameter")
    )


class AdafactorStep:
    """Steps single parameters of transformers' `Adafactor`."""

    def __init__(self, optimizer: Any) -> None:
        """Compile lazily: nothing is compiled before the first CUDA parameter."""
        self.optimizer = optimizer
        self._compiled: list[Callable[..., Any]] = [
            compiled(function, MAX_GRAPHS, fullgraph=True, dynamic=False)
            for function in (_statistics, _square_sum, _apply)
        ]

    def __call__(self, parameter: Tensor, group: dict[str, Any], clip: Clip) -> None:
        """Update `parameter` and its states in place from its `.grad`, which stays as it is.

        A gradient that is not finite leaves the parameter as it is; its statistics decay as by a
        gradient of zeros.
        """
        weight, gradient = _matrices(parameter.detach()), _matrices(parameter.grad)
        norms = (clip.norm, clip.scale())
        is_cuda = parameter.device.type == "cuda"
        passes = self._compiled if is_cuda else (_statistics, _square_sum, _apply)
        statistics, square_sum, apply = passes
        slices = list(_slices(weight.shape, _COMPILED_SLICE if is_cuda else SLICE))

        row_sum = gradient.new_zeros(weight.shape[:2], dtype=torch.float32)  # (B, R)
        column_sum = gradient.new_zeros(weight.shape[::2], dtype=torch.float32)  # (B, C)
        for at, rows in slices:
            of_rows, of_columns = statistics(gradient[at, rows], *norms, group["eps"][0])
            row_sum[at, rows] = of_rows
            column_sum[at] += of_columns
        factors = self._factors(parameter, group, row_sum, column_sum)
        squares = torch.zeros_like(clip.norm)
        for at, rows in slices:
            squares += square_sum(gradient[at, rows], *norms, *factors.part(at, rows))
        rms = (squares / parameter.numel()).sqrt()
        # Not torch.where: a number in it is copied to the GPU, which the host waits for.
        lr = torch.full_like(clip.norm, group["lr"]).masked_fill(~clip.norm.isfinite(), 0.0)
        size = lr / (rms / group["clip_threshold"]).clamp(min=1.0)
        decay = group["weight_decay"] * lr
        for at, rows in slices:
            part = factors.part(at, rows)
            apply(weight[at, rows], gradient[at, rows], *norms, *part, size, decay)

    def _factors(
        self, parameter: Tensor, group: dict[str, Any], row_sum: Tensor, column_sum: Tensor
    ) -> _Factors:
        """Bring the state up to date and return what the gradient is multiplied with."""
        state = self.optimizer.state[parameter]
        if not state:
            state |= {"step": 0, "RMS": 0}
            if parameter.dim() < 2:
                state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
            else:
                state["exp_avg_sq_row"] = row_sum.new_zeros(parameter.shape[:-1])
                shape = (*parameter.shape[:-2], parameter.shape[-1])
                state["exp_avg_sq_col"] = row_sum.new_zeros(shape)
        state["step"] += 1
        mixing = math.pow(state["step"], group["decay_rate"])  # 1 - beta2 of this step
        if parameter.dim() < 2:  # one row: the column sums are the squares themselves
            square = state["exp_avg_sq"].view(1, -1).lerp_(column_sum, mixing)
            return _Factors(torch.ones_like(row_sum), square.rsqrt())
        (_, num_rows), (_, num_columns) = row_sum.shape, column_sum.shape
        row = state["exp_avg_sq_row"].view_as(row_sum).lerp_(row_sum / num_columns, mixing)
        column = state["exp_avg_sq_col"].view_as(column_sum).lerp_(column_sum / num_rows, mixing)
        return _Factors((row / row.mean(dim=-1, keepdim=True)).rsqrt(), column.rsqrt())


class _Factors(NamedTuple):
    """The update before its clip is gradient x row x column."""

    row: Tensor  # (B, R)
    column: Tensor  # (B, C)

    def part(self, at: slice, rows: slice) -> tuple[Tensor, Tensor]:
        return self.row[at, rows], self.column[at]


def _matrices(tensor: Tensor | None) -> Tensor:
    """View a tensor as (B, R, C): matrices over its last two dimensions, a vector as one row."""
    assert tensor is not None
    if tensor.dim() < 2:
        return tensor.view(1, 1, -1)
    return tensor.view(-1, *tensor.shape[-2:])


def _slices(shape: torch.Size, size: int) -> Iterator[tuple[slice, slice]]:
    """Yield slices of B and R with at most `size` elements, as equal as the shape allows."""
    num_matrices, num_rows, num_columns = shape
    at_once = min(num_matrices, max(1, size // (num_rows * num_columns)))
    while num_matrices % at_once:  # equal slices are one graph
        at_once -= 1
    rows_at_once = max(1, size // num_columns)
    for first in range(0, num_matrices, at_once):
        for row in range(0, num_rows, rows_at_once):
            yield slice(first, first + at_once), slice(row, row + rows_at_once)


def _scaled(gradient: Tensor, norm: Tensor, scale: Tensor) -> Tensor:
    return (gradient.float() * scale).masked_fill(~norm.isfinite(), 0.0)


def _statistics(gradient: Tensor, norm: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    square = _scaled(gradient, norm, scale).square() + eps
    return square.sum(dim=-1), square.sum(dim=-2)


def _square_sum(
    gradient: Tensor, norm: Tensor, scale: Tensor, row: Tensor, column: Tensor
) -> Tensor:
    return (_scaled(gradient, norm, scale) * row[..., None] * column[:, None]).square().sum()


def _apply(
    parameter: Tensor,
    gradient: Tensor,
    norm: Tensor,
    scale: Tensor,
    row: Tensor,
    column: Tensor,
    size: Tensor,
    decay: Tensor,
) -> None:
    from torchao.optim.quant_utils import _fp32_to_bf16_sr

    update = _scaled(gradient, norm, scale) * row[..., None] * column[:, None] * size
    weight = parameter.float()
    weight = weight - decay * weight - update
    parameter.copy_(_fp32_to_bf16_sr(weight) if parameter.dtype is torch.bfloat16 else weight)


class SlicedAdafactor(Adafactor):
    """Adafactor without momentum and with its own learning rate, `step()` as `AdafactorStep`.

    With full gradients it is the exact way to train the 30B model on one GPU: 114 GiB of weights
    and gradients in bfloat16, gradients summed over micro-batches, and the clip by the norm of all.
    """

    def __init__(self, params: Any, **kwargs: Any) -> None:
        """Take what transformers' Trainer passes to `Adafactor`.

        Args:
            params: parameters or groups of them.
            **kwargs: of `transformers.Adafactor`.

        Raises:
            ValueError: momentum, a relative step or a step scaled by the parameter.
        """
        super().__init__(params, **kwargs)
        names = ("beta1", "relative_step", "scale_parameter")
        if wrong := [name for name in names if self.defaults[name]]:
            raise ValueError(f"Adafactor with {', '.join(wrong)} does not step in slices")
        keep_float32_states(self)
        self._sliced = AdafactorStep(self)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every parameter that has a gradient; gradients are clipped before, if at all."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._sliced(parameter, group, _as_it_is(parameter.device))
        return loss


def _as_it_is(device: torch.device) -> Clip:
    zero = torch.zeros((), device=device)
    return Clip(norm=zero, limit=torch.full_like(zero, torch.inf), reference=zero)

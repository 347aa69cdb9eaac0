"""One parameter's step of torchao's low-bit AdamW, with clipping and the NaN guard in its kernel.

torchao's own `step()` has no place for a scale that only the device knows, and costs the host 1.9
ms per parameter against 0.4 ms here (434 parameters, AdamW8bit compiled, on an AMD EPYC core). This
calls its update function, so that rule, rounding and state format stay torchao's.

The update is elementwise but for the quantisation blocks, so it goes over slices of whole blocks:
that changes nothing except which random number rounds which element, and it bounds the temporaries
whatever a compiler makes of it. Per element they are 8 bytes compiled by inductor for a CPU (two
float32 copies) and 56 bytes run eagerly (measured on 16 Mi elements).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from monkey_patch.compiled import compiled

# Elements of a slice, multiples of every block size. Both expert tensors of Qwen3-30B-A3B are whole
# numbers of compiled slices (6 and 3), so that one graph serves them.
SLICE = 1 << 18
_COMPILED_SLICE = 1 << 26
# Each length of a flat slice is compiled once: 7 for Qwen3-30B-A3B, which is above torch's limit
# of 8 as soon as a model has a vision tower.
MAX_GRAPHS = 64


@dataclass(frozen=True)
class Clip:
    """What the device knows about a tensor's gradient: 0-dim float32 tensors.

    The gradient is scaled by min(1, limit / reference); without a clip the limit is infinite.
    """

    norm: Tensor
    limit: Tensor
    reference: Tensor

    def scale(self) -> Tensor:
        """Return the factor, a 0-dim float32 tensor; NaN or 0 if the norm is not finite."""
        return (self.limit / (self.reference + 1e-6)).clamp(max=1.0)


def is_low_bit(optimizer: Any) -> bool:
    """Tell torchao's low-bit AdamW family without importing torchao."""
    return type(optimizer).__module__ == "torchao.optim.adam"


class LowBitStep:
    """Steps single parameters of a torchao `AdamW8bit`, `AdamWFp8` or `AdamW4bit`."""

    def __init__(self, optimizer: Any) -> None:
        """Compile lazily: nothing is compiled before the first CUDA parameter.

        Raises:
            ValueError: an option of torchao's that this step does not know.
        """
        if optimizer.defaults["amsgrad"] or not optimizer.is_adamw:
            raise ValueError(f"{type(optimizer).__name__} with amsgrad or coupled weight decay")
        self.optimizer = optimizer
        self._compiled: Callable[..., None] = compiled(
            _update, MAX_GRAPHS, fullgraph=True, dynamic=False
        )

    def __call__(self, parameter: Tensor, group: dict[str, Any], clip: Clip) -> None:
        """Update `parameter` and its states in place from its `.grad`, which stays as it is.

        A gradient that is not finite leaves the parameter as it is; its moments decay as by a
        gradient of zeros.
        """
        state = self._state(parameter)
        state["step"] += 1
        operands = _operands(parameter, state)
        scalars = _scalars(clip, state["step"], group)
        rounds = self.optimizer.bf16_stochastic_round and parameter.dtype is torch.bfloat16
        rule = _rule(group, rounds=rounds)
        is_cuda = parameter.device.type == "cuda"
        size, update = (_COMPILED_SLICE, self._compiled) if is_cuda else (SLICE, _update)
        for begin in range(0, parameter.numel(), size):
            update(operands.part(begin, begin + size), scalars, rule)

    def preview(
        self, parameter: Tensor, group: dict[str, Any], clip: Clip, begin: int, end: int
    ) -> tuple[Tensor, Tensor]:
        """Return a slice of the flat parameter now and as the next step would make it, unrounded.

        Args:
            parameter: with its gradient.
            group: its parameter group.
            clip: as the step will get it.
            begin: first element, a multiple of the block size.
            end: one past the last.

        Returns:
            Two float32 tensors (end - begin,). Draws no random number.
        """
        state = self._state(parameter)
        operands = _operands(parameter, state).part(begin, end)
        before = operands.parameter.float()
        copies = _Operands(
            before.clone(),
            operands.gradient,
            _unpacked(operands.exp_avg),
            _unpacked(operands.exp_avg_sq),
        )
        scalars = _scalars(clip, state["step"] + 1, group)
        _update(copies, scalars, _rule(group, rounds=False))
        return before, copies.parameter

    def _state(self, parameter: Tensor) -> dict[str, Any]:
        state = self.optimizer.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = self._buffer(parameter, signed=True)
            state["exp_avg_sq"] = self._buffer(parameter, signed=False)
        return state

    def _buffer(self, parameter: Tensor, *, signed: bool) -> Tensor:
        """Make a moment of zeros: torchao's format, or float32 for what it does not quantise.

        torchao keeps those of small weights in the weight's dtype. In bfloat16 a second moment
        with beta2 0.999 can hardly change: a thousandth of it is less than half its last place.
        """
        buffer = self.optimizer._new_buffer(parameter, signed)
        return buffer if hasattr(buffer, "codes") else buffer.float()


class _Operands(NamedTuple):
    parameter: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor

    def part(self, begin: int, end: int) -> _Operands:
        return _Operands(*(part(tensor, begin, end) for tensor in self))


class _Scalars(NamedTuple):
    """0-dim tensors: as numbers, each new value would be a new graph."""

    norm: Tensor
    scale: Tensor
    step: Tensor
    lr: Tensor


class _Rule(NamedTuple):
    beta1: float
    beta2: float
    weight_decay: float
    eps: float
    rounds_stochastically: bool


def _operands(parameter: Tensor, state: dict[str, Any]) -> _Operands:
    gradient = parameter.grad
    assert gradient is not None
    return _Operands(parameter.detach(), gradient, state["exp_avg"], state["exp_avg_sq"])


def _scalars(clip: Clip, step: Tensor, group: dict[str, Any]) -> _Scalars:
    return _Scalars(clip.norm, clip.scale(), step, _learning_rate(group["lr"], clip.norm))


def _learning_rate(lr: Tensor | float, like: Tensor) -> Tensor:
    """Return it beside `like`, 0-dim float32; what is there already is not read by the host.

    torchao makes it a tensor of the host's, accelerate moves that to the device with the states.
    """
    if isinstance(lr, Tensor) and lr.device == like.device:
        return lr.to(like.dtype)
    # A number goes along with the kernel; a tensor of the CPU's would be copied, and waited for.
    return torch.full_like(like, float(lr))


def _rule(group: dict[str, Any], *, rounds: bool) -> _Rule:
    beta1, beta2 = group["betas"]
    return _Rule(beta1, beta2, group["weight_decay"], group["eps"], rounds)


def _update(operands: _Operands, scalars: _Scalars, rule: _Rule) -> None:
    from torchao.optim.adam import single_param_adam

    # Not torch.where: eagerly, a number in it is copied to the GPU, which the host waits for.
    is_bad = ~scalars.norm.isfinite()
    gradient = (operands.gradient.float() * scalars.scale).masked_fill(is_bad, 0.0)
    lr = scalars.lr.masked_fill(is_bad, 0.0)
    single_param_adam(
        operands.parameter, gradient, scalars.step, operands.exp_avg, operands.exp_avg_sq, None,
        lr, rule.beta1, rule.beta2, rule.weight_decay, rule.eps,
        IS_ADAMW=True, BF16_STOCHASTIC_ROUND=rule.rounds_stochastically,
    )  # fmt: skip


def part(tensor: Tensor, begin: int, end: int) -> Tensor:
    """Return elements [begin, end) of a flat tensor or torchao state as a view of its storage.

    Args:
        tensor: any shape, contiguous; quantised states by blocks.
        begin: a multiple of the block size.
        end: may lie beyond the last element.
    """
    end = min(end, tensor.numel())
    if not hasattr(tensor, "codes"):
        return tensor.view(-1)[begin:end]
    state: Any = tensor
    names, attributes = state.__tensor_flatten__()
    per_code = tensor.numel() // state.codes.numel()  # 2 where two 4-bit codes share a byte
    blocks = slice(begin // state.block_size, math.ceil(end / state.block_size))
    inner = {name: getattr(state, name) for name in names}
    inner["codes"] = state.codes.view(-1)[begin // per_code : end // per_code]
    inner["scale"] = state.scale[blocks]
    attributes = [
        torch.Size([end - begin]) if isinstance(attribute, tuple) else attribute
        for attribute in attributes
    ]
    return type(state).__tensor_unflatten__(inner, attributes)


def _unpacked(state: Any) -> Tensor:
    """Return a moment as a float32 tensor of its own."""
    return state.dequantize() if hasattr(state, "codes") else state.float().clone()

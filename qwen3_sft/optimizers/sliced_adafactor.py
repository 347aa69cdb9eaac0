"""transformers' Adafactor that steps in slices and rounds bfloat16 weights stochastically.

With full gradients it is the exact way to train the 30B model on one GPU: 114 GiB of weights and
gradients in bfloat16, gradients summed over micro-batches, and the clip by the norm of all of them.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.optimization import Adafactor

from qwen3_sft.optimizers.adafactor import AdafactorStep
from qwen3_sft.optimizers.loaded_states import keep_float32_states
from qwen3_sft.optimizers.low_bit_step import Clip


class SlicedAdafactor(Adafactor):
    """Adafactor without momentum and with its own learning rate, `step()` as `AdafactorStep`."""

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

"""Optimizer states in float32 beside weights in bfloat16 survive a checkpoint.

`Optimizer.load_state_dict` casts every floating state to its weight's dtype, so that a resumed run
would go on from rounded states.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Float32States:
    def __init__(self) -> None:
        self._loading: list[tuple[int, str, Tensor]] = []

    def before(self, optimizer: Any, state_dict: dict[str, Any]) -> None:
        """Remember the saved float32 states by the position of their weight."""
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        self._loading = [
            (position, key, value)
            for position, i in enumerate(ids)
            for key, value in state_dict["state"].get(i, {}).items()
            if isinstance(value, Tensor) and value.dtype is torch.float32 and key != "step"
        ]

    def after(self, optimizer: Any) -> None:
        """Put back those that were cast."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for position, key, value in self._loading:
            parameter = parameters[position]
            state = optimizer.state[parameter]
            if state[key].dtype is not torch.float32:
                state[key] = value.to(parameter.device)
        self._loading = []


def keep_float32_states(optimizer: torch.optim.Optimizer) -> None:
    """Have `load_state_dict` leave float32 states in float32."""
    states = _Float32States()
    optimizer.register_load_state_dict_pre_hook(states.before)
    optimizer.register_load_state_dict_post_hook(states.after)

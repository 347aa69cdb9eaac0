"""Optimizers that transformers has no name for, asked for with `--optim_args`.

`states=fp8` is torchao's AdamWFp8; `bf16_stochastic_round=True` with Adafactor is ours in slices.
"""

from __future__ import annotations

from typing import Any

from qwen3_sft.errors import UsageError
from qwen3_sft.plan.optimizer_states import OptimizerChoice

_STATES = ("8bit", "fp8")


def with_states(optim: str, optim_args: str | None, chosen: tuple[Any, dict]) -> tuple[Any, dict]:
    """Replace the optimizer class that transformers chose by the one that `optim_args` asks for.

    Args:
        optim: value of --optim.
        optim_args: value of --optim_args, such as `states=fp8,bf16_stochastic_round=True`.
        chosen: class and keyword arguments as transformers made them of both.

    Raises:
        UsageError: unknown states, or states for another optimizer.
    """
    given = OptimizerChoice(optim, optim_args).given
    if optim == "adafactor" and given.get("bf16_stochastic_round", "").lower() == "true":
        from qwen3_sft.optimizers.sliced_adafactor import SlicedAdafactor

        return SlicedAdafactor, chosen[1]
    states = given.get("states")
    if states is None:
        return chosen
    if optim != "adamw_torch_8bit" or states not in _STATES:
        raise UsageError(
            f"--optim_args states={states} with --optim {optim}: states is one of {_STATES} and "
            "goes with --optim adamw_torch_8bit"
        )
    from torchao.optim import AdamW8bit, AdamWFp8

    return (AdamWFp8 if states == "fp8" else AdamW8bit), chosen[1]

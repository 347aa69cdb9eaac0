"""torchao's AdamWFp8, which transformers has no name for: `--optim_args states=fp8`."""

from __future__ import annotations

from typing import Any

from qwen3_sft.recipe import UsageError

_STATES = ("8bit", "fp8")


def with_states(optim: str, optim_args: str | None, chosen: tuple[Any, dict]) -> tuple[Any, dict]:
    """Replace the optimizer class that transformers chose by the one that `states=` asks for.

    Args:
        optim: value of --optim.
        optim_args: value of --optim_args, such as `states=fp8,bf16_stochastic_round=True`.
        chosen: class and keyword arguments as transformers made them of both.

    Raises:
        UsageError: unknown states, or states for another optimizer.
    """
    pairs = (pair.split("=", 1) for pair in (optim_args or "").replace(" ", "").split(",") if pair)
    states = {pair[0]: pair[-1] for pair in pairs}.get("states")
    if states is None:
        return chosen
    if optim != "adamw_torch_8bit" or states not in _STATES:
        raise UsageError(
            f"--optim_args states={states} with --optim {optim}: states is one of {_STATES} and "
            "goes with --optim adamw_torch_8bit"
        )
    from torchao.optim import AdamW8bit, AdamWFp8

    return (AdamWFp8 if states == "fp8" else AdamW8bit), chosen[1]

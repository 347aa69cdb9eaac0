"""Which optimizers there are, in one table, and which of them a run uses.

A name of --optim that is not in the table is transformers' own affair: its memory is planned as
torch's AdamW, its text says so, and it does not step within the backward pass. `states=fp8` in
--optim_args is torchao's AdamWFp8; `bf16_stochastic_round=True` with Adafactor is ours in slices.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from qwen3_sft.distributed.engine import Engine
from qwen3_sft.errors import UsageError
from qwen3_sft.options.recipe import Options
from qwen3_sft.options.train_args import TrainArguments


@dataclass(frozen=True)
class Optimizer:
    """A row of the table.

    Attributes:
        states: two tensors like the weight (`adamw`), two of codes with scales (`low_bit`), or a
            row and a column of each matrix (`adafactor`).
        code_bytes: of an element of each state, where it is coded.
        table: entries of the float32 table that decodes them.
        is_fused: whether an update has no temporaries.
        in_backward: whether it can update one parameter at a time.
        shards: whether it is tested on sharded weights.
        rounds: whether it can round bfloat16 weights stochastically.
        is_counted: whether the plan knows its states.
    """

    states: Literal["adamw", "low_bit", "adafactor"] = "adamw"
    code_bytes: float = 0.0
    table: int = 0
    is_fused: bool = False
    in_backward: bool = True
    shards: bool = True
    rounds: bool = False
    is_counted: bool = True


FUSED, EIGHT_BITS, FOUR_BITS = "adamw_torch_fused", "adamw_torch_8bit", "adamw_torch_4bit"
TABLE = {
    EIGHT_BITS: Optimizer("low_bit", 1.0, 256, shards=False, rounds=True),
    FOUR_BITS: Optimizer("low_bit", 0.5, 16, shards=False, rounds=True),
    "adafactor": Optimizer("adafactor", shards=False, rounds=True),
    "adamw_torch": Optimizer(),
    FUSED: Optimizer(is_fused=True),
}
_FP8_STATES = ("8bit", "fp8")
_ROUNDS = "bf16_stochastic_round"


@dataclass(frozen=True)
class OptimizerChoice:
    """The optimizer of a run.

    Attributes:
        optim: value of --optim.
        optim_args: value of --optim_args, such as `states=fp8,bf16_stochastic_round=True`.
        in_backward: --optimizer_in_backward.
    """

    optim: str = FUSED
    optim_args: str | None = None
    in_backward: bool = False

    @classmethod
    def of(cls, train: TrainArguments) -> OptimizerChoice:
        """Read it off the options, drafted or final."""
        return cls(optimizer_name(train), train.optim_args, train.optimizer_in_backward)

    @property
    def row(self) -> Optimizer:
        """What the table says of it, or what is assumed of a name that is not in it."""
        unknown = Optimizer(
            is_fused=True, in_backward=False, shards="8bit" not in self.optim, is_counted=False
        )
        return TABLE.get(self.optim, unknown)

    @property
    def given(self) -> dict[str, str]:
        """The pairs of `optim_args`."""
        pairs = (self.optim_args or "").replace(" ", "").split(",")
        return {pair.split("=", 1)[0]: pair.split("=", 1)[-1] for pair in pairs if pair}

    @property
    def own_arguments(self) -> set[str]:
        """Names in `optim_args` that this project reads, and not transformers."""
        return {"states"} | ({_ROUNDS} if self.row.rounds else set())

    @property
    def has_fp8_states(self) -> bool:
        """Whether its codes are float8, which need no table."""
        return self.given.get("states") == "fp8"

    @property
    def is_sliced(self) -> bool:
        """Whether it updates a tensor slice by slice."""
        if self.row.states == "adafactor":
            return self.rounds_stochastically
        return self.row.states == "low_bit" and self.in_backward

    @property
    def rounds_stochastically(self) -> bool:
        """Whether bfloat16 weights keep small updates on average."""
        if self.row.states == "adafactor" and self.in_backward:
            return True  # it steps in slices there, whatever its class
        return self.given.get(_ROUNDS, "").lower() == "true"

    def describe(self) -> str:
        """Return the words of a plan's row."""
        if self.row.states == "adafactor":
            return "optimizer (Adafactor, a row and a column of each matrix)"
        if self.row.states == "low_bit":
            kind = "fp8" if self.has_fp8_states else self.optim.rpartition("_")[2]
            return f"optimizer (AdamW, two states in {kind})"
        unknown = "" if self.row.is_counted else f"; --optim {self.optim} is not counted"
        return f"optimizer (AdamW, two states{unknown})"


def choose_optimizer(options: Options, engine: Engine) -> OptimizerChoice:
    """Return what the options ask for, with stochastic rounding unless they say something of it.

    Without it, which is the optimizers' default, bfloat16 weights lose most updates.

    Args:
        options: of the run.
        engine: what spreads it; weights in shards are rounded to nearest.
    """
    choice = OptimizerChoice.of(options.train)
    is_whole = engine.layout == "whole" and options.model.dtype == "bfloat16"
    is_said = choice.rounds_stochastically or _ROUNDS in str(choice.optim_args)
    if is_said or not (choice.row.rounds and is_whole):
        return choice
    return replace(
        choice, optim_args=",".join(filter(None, [choice.optim_args, f"{_ROUNDS}=True"]))
    )


def optimizer_name(train: TrainArguments) -> str:
    """Return the name behind --optim, which is an enum by default and a word if it was given."""
    return str(getattr(train.optim, "value", train.optim))


def check_optimizer_choice(train: TrainArguments, choice: OptimizerChoice, engine: Engine) -> None:
    """Refuse what an optimizer, or an update within the backward pass, cannot do.

    Args:
        train: with `gradient_accumulation_steps` as they will be.
        choice: of the optimizer.
        engine: what spreads the run over processes.

    Raises:
        UsageError: naming the option and what to use instead.
    """
    if engine.shards_weights and not choice.row.shards:
        raise UsageError(f"--optim {choice.optim} is not tested on sharded weights; use {FUSED}")
    clip, max_norm = train.clip, train.max_grad_norm
    if not choice.in_backward:
        if clip != "global":
            raise UsageError(f"--clip {clip} is for --optimizer_in_backward true; leave it out")
        return
    name = "--optimizer_in_backward true"
    if engine.kind != "single":
        raise UsageError(
            f"{name} is for one process and this is {engine}: launch with config/single.json, or "
            "leave it out, since shards of gradients take little room"
        )
    if train.gradient_accumulation_steps != 1:
        raise UsageError(
            f"{name} updates after every micro-batch, so gradient_accumulation_steps "
            f"{train.gradient_accumulation_steps} cannot be: set "
            "--per_device_train_batch_size instead, or keep full gradients with --optim adafactor "
            "and without --optimizer_in_backward"
        )
    if clip == "global" and max_norm > 0:
        raise UsageError(
            f"{name} cannot clip by the norm of all gradients, which is known only after the "
            f"last update (--clip global, --max_grad_norm {max_norm}): set --clip per_tensor or "
            "--clip delayed, or --max_grad_norm 0; for the exact clip keep full gradients with "
            "--optim adafactor and without --optimizer_in_backward"
        )
    if train.fp16:
        raise UsageError(f"{name} has no loss scaling: set --bf16 true instead of --fp16")
    if not choice.row.in_backward:
        known = [optim for optim, row in TABLE.items() if row.in_backward]
        raise UsageError(f"{name} does not know --optim {choice.optim}: use one of {known}")


def with_states(choice: OptimizerChoice, chosen: tuple[Any, dict]) -> tuple[Any, dict]:
    """Replace the optimizer class that transformers chose by the one that `optim_args` asks for.

    Args:
        choice: with `states` or `bf16_stochastic_round` among its arguments.
        chosen: class and keyword arguments as transformers made them of both.

    Raises:
        UsageError: unknown states, or states for another optimizer.
    """
    given = choice.given
    if choice.row.states == "adafactor" and given.get(_ROUNDS, "").lower() == "true":
        from qwen3_sft.optimizers.adafactor import SlicedAdafactor

        return SlicedAdafactor, chosen[1]
    states = given.get("states")
    if states is None:
        return chosen
    if choice.optim != EIGHT_BITS or states not in _FP8_STATES:
        raise UsageError(
            f"--optim_args states={states} with --optim {choice.optim}: states is one of "
            f"{_FP8_STATES} and goes with --optim {EIGHT_BITS}"
        )
    from torchao.optim import AdamW8bit, AdamWFp8

    return (AdamWFp8 if choice.has_fp8_states else AdamW8bit), chosen[1]

"""What one measurement of whole steps is: every choice that may change its figures."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args

from qwen3_sft.errors import UsageError
from qwen3_sft.model.activation_checkpointing import Policy


@dataclass(frozen=True)
class StepOptions:
    """Options of one row; those that a run has too carry its names and mean the same."""

    model: Literal["demo", "30b"] = field(
        default="demo", metadata={"help": "sizes; the weights are random"}
    )
    layers: int | None = field(
        default=None, metadata={"help": "decoder layers; default: the model's own"}
    )
    max_length: int = field(default=1024, metadata={"help": "tokens in one row"})
    batch: int = field(default=1, metadata={"help": "rows per step"})
    dtype: Literal["float32", "bfloat16", "autocast"] = field(
        default="float32",
        metadata={"help": "of weights and products; autocast: float32 weights, bf16 products"},
    )
    optim: str = field(default="adamw_torch_fused", metadata={"help": "as in a run"})
    optim_args: str | None = field(default=None, metadata={"help": "as in a run"})
    optimizer_in_backward: bool = field(default=False, metadata={"help": "as in a run"})
    clip: Literal["global", "delayed", "per_tensor"] = field(
        default="global", metadata={"help": "as in a run"}
    )
    activation_checkpointing: str = field(
        default="none",
        metadata={"help": "none, selective, full, or layers of each: full=8,selective=40"},
    )
    activation_offload: bool = field(default=False, metadata={"help": "as in a run"})
    torch_compile: bool = field(default=False, metadata={"help": "each decoder layer"})
    experts_implementation: Literal[
        "scatter_moe", "scatter_moe_recompute", "grouped_mm", "batched_mm", "eager"
    ] = field(default="scatter_moe", metadata={"help": "as in a run"})
    attn_implementation: str = field(default="auto", metadata={"help": "as in a run"})
    fp8: Literal["off", "attention", "experts", "all"] = field(
        default="off", metadata={"help": "as in a run; emulated on a CPU"}
    )
    fp8_scaling: Literal["blockwise", "rowwise", "mxfp8"] = field(
        default="blockwise", metadata={"help": "as in a run"}
    )
    use_liger: bool | None = field(
        default=None, metadata={"help": "Liger's RMSNorm and RoPE; default: on CUDA"}
    )
    router_aux_loss: bool = field(
        default=True, metadata={"help": "our router: balance loss, load and entropy every step"}
    )
    lengths: Literal["packed", "fixed"] = field(
        default="packed",
        metadata={"help": "log-normal documents, or one of max_length tokens per row"},
    )
    document_tokens: int = field(
        default=405, metadata={"help": "mean of the log-normal lengths before they are cut"}
    )
    packing: bool = field(
        default=True, metadata={"help": "false: one document per row, padded to max_length"}
    )
    routing: Literal["uniform", "skewed"] = field(
        default="uniform", metadata={"help": "skewed: router weights scaled by expert"}
    )
    warm_up: int = field(default=5, metadata={"help": "steps before those that count"})
    steps: int = field(default=20, metadata={"help": "steps that count"})
    breakdown: bool = field(default=False, metadata={"help": "3 more steps under the profiler"})

    def __post_init__(self) -> None:
        """Refuse what could not be measured.

        Raises:
            UsageError: naming the option.
        """
        if self.breakdown and self.torch_compile:
            raise UsageError(
                "--breakdown true with --torch_compile true: a compiled layer has no components; "
                "leave one out"
            )
        if self.warm_up < 1 or self.steps < 1:
            raise UsageError(f"--warm_up {self.warm_up} --steps {self.steps}: each at least 1")
        if self.document_tokens < 8:
            raise UsageError(f"--document_tokens {self.document_tokens}: at least 8")

    def policies(self, num_layers: int) -> dict[Policy, int]:
        """Return the number of layers by checkpointing policy.

        Raises:
            UsageError: `activation_checkpointing` is not a policy and no list of them either.
        """
        words: dict[str, str] = {}
        for word in self.activation_checkpointing.split(","):
            policy, _, count = word.partition("=")
            words[policy] = count or str(num_layers)
        counts = {p: int(words[p]) for p in get_args(Policy) if words.get(p, "").isdecimal()}
        if len(counts) != len(words) or sum(counts.values()) != num_layers:
            raise UsageError(
                f"--activation_checkpointing {self.activation_checkpointing}: one of "
                f"{', '.join(get_args(Policy))}, or layers of each that make {num_layers}, such as "
                f"full=1,selective={num_layers - 1}"
            )
        return counts


# What differs where plain transformers trains the same model: its own experts, attention, router
# and norms, full checkpointing, and an optimizer that steps after the backward pass.
TRANSFORMERS: dict[str, Any] = {
    "experts_implementation": "grouped_mm",
    "attn_implementation": "sdpa",
    "use_liger": False,
    "router_aux_loss": False,
    "activation_checkpointing": "full",
    "activation_offload": False,
    "torch_compile": False,
    "fp8": "off",
    "optimizer_in_backward": False,
    "clip": "global",
}
# name of a row -> what it changes in the options given.
ROWS: dict[str, dict[str, Any]] = {
    "ours": {},
    "transformers": TRANSFORMERS,
    "grouped_mm": {"experts_implementation": "grouped_mm"},
}


def row_options(options: StepOptions, row: str) -> StepOptions:
    """Return the options of a row of `ROWS`."""
    return replace(options, **ROWS[row])


def pick(values: dict[str, Any]) -> StepOptions:
    """Make options of what a parser read, whatever else it read."""
    return StepOptions(**{f.name: values[f.name] for f in fields(StepOptions)})


def differences(one: StepOptions, other: StepOptions) -> dict[str, Any]:
    """Return the options of `other` that are not those of `one`."""
    before = asdict(one)
    return {name: value for name, value in asdict(other).items() if value != before[name]}

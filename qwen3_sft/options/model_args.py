"""Which model to train and what computes it: the options of the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

# Values of --experts_implementation that are patches of ours; the others are transformers' own.
EXPERT_PATCHES = ("scatter_moe", "scatter_moe_recompute")


@dataclass
class ModelArguments:
    """Which model to train and what computes it."""

    model_name_or_path: str = field(
        default="", metadata={"help": "folder or hub id of a Qwen3-MoE; `demo` builds a tiny one"}
    )
    model_revision: str | None = field(
        default=None, metadata={"help": "commit, tag or branch of a hub model"}
    )
    dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="auto",
        metadata={
            "help": "of the trained weights; auto: float32 (with bf16 autocast where the GPU can)"
        },
    )
    export_dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "of the exported model; auto: the base model's own"}
    )
    export_layout: Literal["hub", "fused"] = field(
        default="hub",
        metadata={
            "help": "names of the exported weights: hub, the released models', every expert for "
            "itself; fused, transformers 5's own, which several readers do not know"
        },
    )
    experts_implementation: Literal[
        "scatter_moe", "scatter_moe_recompute", "grouped_mm", "batched_mm", "eager"
    ] = field(
        default="scatter_moe",
        metadata={"help": "what computes the experts; _recompute keeps less for the backward pass"},
    )
    attn_implementation: Literal[
        "auto",
        "flash_attention_4",
        "flash_attention_3",
        "flash_attention_2",
        "torch_varlen",
        "sdpa",
        "eager",
    ] = field(default="auto", metadata={"help": "auto takes the best the device and packages have"})
    use_liger: bool | None = field(
        default=None, metadata={"help": "Liger's RMSNorm and RoPE kernels; default: on CUDA"}
    )
    fp8: Literal["off", "attention", "experts", "all", "auto"] = field(
        default="off",
        metadata={
            "help": "which products run in FP8; router, first and last layer, lm_head, embeddings "
            "and norms stay in BF16; auto: what a benchmark on this device has shown to be faster"
        },
    )
    fp8_keep: list[str] = field(
        default_factory=list,
        metadata={"help": "patterns of module names that stay in BF16 too, `*layers.3.*`"},
    )
    fp8_recipe: Literal["rowwise", "tensorwise", "rowwise_with_gw_hp"] = field(
        default="rowwise", metadata={"help": "torchao's scaling of attention's projections"}
    )
    fp8_scaling: Literal["blockwise", "rowwise", "mxfp8"] = field(
        default="blockwise",
        metadata={
            "help": "of the experts: blocks of 128 (weights 128 x 128), whole rows, or powers of "
            "two for blocks of 32 (mxfp8: sm_100 and later; not measured)"
        },
    )
    fsdp_size: int = field(
        default=1,
        metadata={
            "help": "processes that share one copy of the weights (transformers' native FSDP2); "
            "-1: all"
        },
    )
    ep_size: int = field(
        default=1, metadata={"help": "processes that share the experts of a layer; see README"}
    )
    dp_replicate_size: int = field(
        default=1, metadata={"help": "copies of the weights, each over fsdp_size processes"}
    )

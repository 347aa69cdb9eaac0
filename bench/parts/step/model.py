"""A model with random weights, on its device, as a run would have patched it.

Weights are created in the dtype they keep, on the device they stay on: no second copy exists.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from statistics import NormalDist
from typing import Any

import torch
from parts.step.options import StepOptions
from transformers import AutoModelForCausalLM, Qwen3MoeConfig
from transformers.models.qwen3_moe import modeling_qwen3_moe

import monkey_patch
from qwen3_sft.demo.model import tiny_config
from qwen3_sft.errors import ModelError
from qwen3_sft.families.flops import head_dim
from qwen3_sft.families.known_models import KNOWN_CONFIGS
from qwen3_sft.model.activation_checkpointing import enable_checkpointing
from qwen3_sft.model.attention import choose_attention
from qwen3_sft.model.attention_trial import VARLEN, switch_on
from qwen3_sft.model.fp8 import choose_fp8
from qwen3_sft.model.layer_compile import compile_layers
from qwen3_sft.model.patches import choose_patches
from qwen3_sft.options.model_args import EXPERT_PATCHES, ModelArguments
from qwen3_sft.options.train_args import TrainArguments
from qwen3_sft.plan.planner import experts_for

# Tokens of the fullest expert over the mean that `skewed` aims at, where enough experts exist.
SKEW = 4.0


def build_model(
    options: StepOptions, args: TrainArguments, model_args: ModelArguments
) -> tuple[Any, dict[str, Any]]:
    """Return the model, ready for a trainer, and what was resolved for it.

    Args:
        options: the row.
        args: its device.
        model_args: what a run makes of the row's options.
    """
    config = model_config(options)
    weights = torch.bfloat16 if options.dtype == "bfloat16" else torch.float32
    torch.manual_seed(0)
    with args.device:
        model = AutoModelForCausalLM.from_config(config, dtype=weights)
    model.config.use_cache = False
    even_routing(model)
    if options.routing == "skewed":
        skew_routers(model)
    policies = options.policies(config.num_hidden_layers)
    experts = experts_for(model_args.experts_implementation, policies)
    compute = weights if options.dtype == "float32" else torch.bfloat16
    attention, _ = choose_attention(
        model_args.attn_implementation, args.device, compute, head_dim(config)
    )
    switch_on(attention)
    if experts not in EXPERT_PATCHES:
        model.set_experts_implementation(experts)
    if attention not in VARLEN:
        model.set_attn_implementation(attention)
    chosen = replace(model_args, experts_implementation=experts)
    # Whether documents share a scale is a question of results, not of speed.
    fp8 = choose_fp8(chosen, args.device, packing=False)
    patches = [
        patch for patch in choose_patches(chosen, attention, fp8)
        if patch != "router_aux_loss" or options.router_aux_loss
    ]  # fmt: skip
    applied = monkey_patch.apply_patches(model, patches)
    enable_checkpointing(model, policies, offload=options.activation_offload)
    if options.torch_compile:
        compile_layers(model)
    return model, {
        "experts_implementation": experts,
        "attn_implementation": attention,
        "use_liger": wants_liger(model_args, args.device),
        "patches": list(applied.names),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def model_config(options: StepOptions) -> Qwen3MoeConfig:
    """Return the config of `--model` with `--layers` of its layers."""
    sizes: dict[str, Any] = dict(KNOWN_CONFIGS["Qwen/Qwen3-30B-A3B"])
    config = tiny_config() if options.model == "demo" else Qwen3MoeConfig(**sizes)
    if options.layers:
        config.num_hidden_layers = options.layers
    return config


# ---- Liger ----


def wants_liger(options: ModelArguments, device: torch.device) -> bool:
    """Tell whether the row runs with Liger's RMSNorm and RoPE.

    Raises:
        ModelError: asked for without a CUDA device.
    """
    is_cuda = device.type == "cuda"
    if options.use_liger and not is_cuda:
        raise ModelError("--use_liger true: Liger's kernels need a CUDA device; leave it out")
    return is_cuda if options.use_liger is None else options.use_liger


@contextmanager
def liger_kernels(is_on: bool) -> Iterator[None]:
    """Have models that are built and run inside use Liger's RMSNorm and RoPE.

    Liger replaces names in transformers' module for the whole process; the next row may be one
    without them, so they are put back.
    """
    if not is_on:
        yield
        return
    from liger_kernel.transformers import apply_liger_kernel_to_qwen3_moe

    names = ("apply_rotary_pos_emb", "Qwen3MoeRMSNorm")
    kept = {name: getattr(modeling_qwen3_moe, name) for name in names}
    apply_liger_kernel_to_qwen3_moe(
        swiglu=False, cross_entropy=False, fused_linear_cross_entropy=False
    )
    try:
        yield
    finally:
        for name, original in kept.items():
            setattr(modeling_qwen3_moe, name, original)


# ---- routing ----


@torch.no_grad()
def even_routing(model: Any) -> None:
    """Give the embeddings a standard deviation of 1, so that tokens visit experts by themselves.

    As initialised (0.02) they are small beside what attention adds, the mean over a document, and
    all tokens of a document would visit the same few experts.
    """
    model.model.embed_tokens.weight.div_(model.config.initializer_range)


@torch.no_grad()
def skew_routers(model: Any) -> None:
    """Scale the rows of each router so that its experts are visited unequally.

    Only weights change: what runs is the model's own router, without a hook. Under random weights
    the logit of an expert is nearly normal with mean 0, so a row scaled by s passes a threshold t
    with probability P(z > t / s), and the scales follow from the loads that are wanted. Hot experts
    differ from layer to layer. What came out is in each result (`expert_load_max_over_mean`).
    """
    generator = torch.Generator().manual_seed(0)
    for layer in model.model.layers:
        router = layer.mlp.gate
        scales = torch.tensor(router_scales(router.num_experts, router.top_k))
        order = torch.randperm(len(scales), generator=generator)
        router.weight.mul_(scales[order].to(router.weight)[:, None])


def router_scales(num_experts: int, top_k: int) -> list[float]:
    """Return the factor of each expert's row, the most visited first; their mean square is 1."""
    visited = [top_k / num_experts * load for load in loads(num_experts, top_k)]
    scales = [1 / NormalDist().inv_cdf(1 - share) for share in visited]
    norm = math.sqrt(sum(s * s for s in scales) / len(scales))
    return [s / norm for s in scales]


def loads(num_experts: int, top_k: int) -> list[float]:
    """Return each expert's load over the mean: 1 / rank^a with the `a` that makes the first SKEW.

    The first expert is visited by 40% of the tokens at most: a scale can bring it to half of them.
    """
    wanted = min(SKEW, 0.4 * num_experts / top_k)
    low, high = 0.0, 3.0
    for _ in range(50):
        middle = (low + high) / 2
        total = sum(rank**-middle for rank in range(1, num_experts + 1))
        low, high = (middle, high) if num_experts / total < wanted else (low, middle)
    total = sum(rank**-low for rank in range(1, num_experts + 1))
    return [num_experts * rank**-low / total for rank in range(1, num_experts + 1)]

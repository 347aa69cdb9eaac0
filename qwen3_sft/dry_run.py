"""What a run would do, without touching data or weights: options, engine, patches, memory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
import yaml

import monkey_patch
from monkey_patch.fp8_selection import describe
from qwen3_sft.distributed.engine import check_experts, deepspeed_config, detect
from qwen3_sft.model.fp8 import choose_fp8
from qwen3_sft.model.loading import choose_attention
from qwen3_sft.model.meta_model import meta_model
from qwen3_sft.model.patches import choose_patches, fp8_selection
from qwen3_sft.options.recipe import Options
from qwen3_sft.plan.nearest import describe_advice, nearest
from qwen3_sft.plan.planner import compute_dtype, experts_for, plan_here
from qwen3_sft.plan.zero3_units import check_zero3
from qwen3_sft.plan.zero3_units import describe as describe_units


def dry_run(options: Options, environment: Mapping[str, str] | None = None) -> Iterator[str]:
    """Yield the lines to print.

    Args:
        options: of the run.
        environment: what accelerate's launcher sets; the process's own by default.

    Raises:
        ModelError: the model cannot be found or trained.
        PatchError: a patch does not fit the model.
        UsageError: the engine does not fit the options or the model.
        DoesNotFitError: after the last line, if the GPU's memory does not suffice.
    """
    env = os.environ if environment is None else environment
    yield "options (a recipe that runs again):"
    yield _indent(yaml.safe_dump(options.resolved(), sort_keys=False, allow_unicode=True))
    engine = detect(options.model, options.data, env)
    model = meta_model(options.model.model_name_or_path, options.model.model_revision)
    check_experts(engine, model.config.num_experts)
    is_cuda = torch.cuda.is_available()
    device = torch.device("cuda" if is_cuda else "cpu")
    plan = plan_here(model, options, engine, env)
    advice = None
    if plan.fits is False:  # while the model is unpatched, as a plan needs it
        advice = nearest(options, engine, lambda o: plan_here(model, o, engine, env))
    attention, reason = choose_attention(
        options.model.attn_implementation, device, compute_dtype(options, on_gpu=is_cuda)
    )
    yield f"attention: {attention} ({reason})"
    if engine.kind == "zero3":
        yield describe_units(check_zero3(model, deepspeed_config(env)))
    chosen = replace(
        options.model,
        experts_implementation=experts_for(options.model.experts_implementation, plan.layers),
    )
    fp8 = choose_fp8(chosen, device, packing=options.data.packing)
    if selection := fp8_selection(model, chosen, fp8):
        yield describe(selection)
    monkey_patch.apply_patches(model, choose_patches(chosen, attention, fp8))  # logs each one
    yield from plan.lines()
    if plan.fits is False:
        yield describe_advice(advice)
    plan.check()


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.rstrip().splitlines())

"""What a run would do, without touching data or weights: options, engine, patches, memory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import yaml
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

import monkey_patch
from monkey_patch.kernels.linear_cross_entropy.op import CHUNK_TOKENS
from qwen3_sft.activation_plan import Policy, activation_plan
from qwen3_sft.args import EXPERT_PATCHES
from qwen3_sft.demo.build import NAME as DEMO
from qwen3_sft.demo.build import VOCAB_SIZE
from qwen3_sft.demo.model import tiny_config
from qwen3_sft.engine import Engine, check_experts, deepspeed_config, detect
from qwen3_sft.known_models import KNOWN_CONFIGS
from qwen3_sft.memory_plan import GIB, memory_plan
from qwen3_sft.model import choose_attention, resolve_model, weights_dtype
from qwen3_sft.patches import choose_patches
from qwen3_sft.recipe import Options
from qwen3_sft.zero import check_zero3, describe


def dry_run(options: Options, environment: Mapping[str, str] | None = None) -> Iterator[str]:
    """Yield the lines to print.

    Args:
        options: of the run.
        environment: what accelerate's launcher sets; the process's own by default.

    Raises:
        ModelError: the model cannot be found or trained.
        PatchError: a patch does not fit the model.
        UsageError: the engine does not fit the options or the model.
    """
    env = os.environ if environment is None else environment
    yield "options (a recipe that runs again):"
    yield _indent(yaml.safe_dump(options.resolved(), sort_keys=False, allow_unicode=True))
    engine = detect(options.model, options.data, env)
    model = meta_model(options.model.model_name_or_path, options.model.model_revision)
    check_experts(engine, model.config.num_experts)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    here = torch.bfloat16 if device.type == "cuda" else _weights(options, engine, torch.float32)
    attention, reason = choose_attention(options.model.attn_implementation, device, here)
    yield f"attention: {attention} ({reason})"
    if engine.kind == "zero3":
        yield describe(check_zero3(model, deepspeed_config(env)))
    monkey_patch.apply_patches(model, choose_patches(options.model, attention))  # logs each one
    yield from _memory(model, options, engine, here, env)


def known_config(name: str) -> PretrainedConfig | None:
    """Return the configuration of a model that is known without network or checkpoint."""
    if name == DEMO:
        return tiny_config(VOCAB_SIZE)
    if name in KNOWN_CONFIGS and not Path(name).is_dir():
        return Qwen3MoeConfig(**KNOWN_CONFIGS[name])
    return None


def model_on_meta(config: PretrainedConfig) -> PreTrainedModel:
    """Build a model without memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def meta_model(name: str, revision: str | None = None) -> PreTrainedModel:
    """Build the model of a known name, a folder or a hub id without its weights.

    Raises:
        ModelError: the model cannot be found or trained.
    """
    if config := known_config(name):
        return model_on_meta(config)
    folder = resolve_model(name, revision)
    return model_on_meta(AutoConfig.from_pretrained(folder, trust_remote_code=False))


def _memory(
    model: PreTrainedModel,
    options: Options,
    engine: Engine,
    here: torch.dtype,
    env: Mapping[str, str],
) -> Iterator[str]:
    # Several processes are planned for GPUs, also on a machine that has none.
    compute = here if engine.kind == "single" else torch.bfloat16
    world_size = int(env.get("WORLD_SIZE", "1"))
    shards = env.get("PARALLELISM_CONFIG_DP_SHARD_SIZE", "1")
    yield f"engine: {engine}" + (f" over {world_size} processes" if world_size > 1 else "")
    plan = memory_plan(
        model,
        engine,
        weights=_weights(options, engine, compute),
        compute=compute,
        world_size=world_size,
        gpus_per_node=int(env.get("LOCAL_WORLD_SIZE", world_size)),
        shards=int(shards) if shards not in ("1", "None") else None,
        deepspeed=deepspeed_config(env) if engine.layout == "zero" else None,
    )
    has_gpu = torch.cuda.is_available()
    total = torch.cuda.get_device_properties(0).total_memory / GIB if has_gpu else None
    yield from plan.lines(total)
    yield from _activations(model, options, engine, compute)


def _activations(
    model: PreTrainedModel, options: Options, engine: Engine, compute: torch.dtype
) -> Iterator[str]:
    """Say what a micro-batch keeps, where our experts and attention compute it."""
    experts = options.model.experts_implementation
    if experts not in EXPERT_PATCHES:
        yield f"activations: not counted for --experts_implementation {experts}"
        return
    values = options.train_values
    policy: Policy = values["activation_checkpointing_policy"]
    policy = policy if values["activation_checkpointing"] else "none"
    residual = _weights(options, engine, compute) if engine.layout == "whole" else compute
    plan = activation_plan(
        model.config.get_text_config(),
        policy,
        compute_bytes=compute.itemsize,
        residual_bytes=residual.itemsize,
        keeps_hidden=experts == "scatter_moe" and policy != "selective",
        chunk_tokens=CHUNK_TOKENS,
    )
    yield from plan.lines(values["per_device_train_batch_size"] * options.data.max_length)


def _weights(options: Options, engine: Engine, compute: torch.dtype) -> torch.dtype:
    return weights_dtype(options.model, engine, compute)


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.rstrip().splitlines())

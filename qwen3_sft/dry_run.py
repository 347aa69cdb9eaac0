"""What a run would do, without touching data or weights: options, patches, memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig

import monkey_patch
from qwen3_sft.demo.build import NAME as DEMO
from qwen3_sft.demo.build import VOCAB_SIZE
from qwen3_sft.demo.model import tiny_config
from qwen3_sft.known_models import KNOWN_CONFIGS
from qwen3_sft.model import choose_attention, resolve_model, weights_dtype
from qwen3_sft.patches import choose_patches
from qwen3_sft.recipe import Options

_GIB = 2**30


def dry_run(options: Options) -> Iterator[str]:
    """Yield the lines to print.

    Raises:
        ModelError: the model cannot be found or trained.
        PatchError: a patch does not fit the model.
    """
    yield "options (a recipe that runs again):"
    yield _indent(yaml.safe_dump(options.resolved(), sort_keys=False, allow_unicode=True))
    model = _meta_model(options.model.model_name_or_path, options.model.model_revision)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weights = weights_dtype(options.model)
    compute = torch.bfloat16 if device.type == "cuda" else weights
    attention, reason = choose_attention(options.model.attn_implementation, device, compute)
    yield f"attention: {attention} ({reason})"
    monkey_patch.apply_patches(model, choose_patches(options.model, attention))  # logs each one
    yield from _memory(model, weights, compute)


def _meta_model(name: str, revision: str | None) -> PreTrainedModel:
    if name == DEMO:
        config = tiny_config(VOCAB_SIZE)
    elif name in KNOWN_CONFIGS and not Path(name).is_dir():
        config = Qwen3MoeConfig(**KNOWN_CONFIGS[name])
    else:
        config = AutoConfig.from_pretrained(resolve_model(name, revision), trust_remote_code=False)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _memory(model: PreTrainedModel, weights: torch.dtype, compute: torch.dtype) -> Iterator[str]:
    parameters = sum(p.numel() for p in model.parameters())
    rows = {
        "weights": parameters * weights.itemsize,
        "gradients": parameters * weights.itemsize,
        "optimizer (AdamW, two states)": 2 * parameters * weights.itemsize,
    }
    if compute != weights:
        experts = max(p.numel() for p in model.parameters())
        rows["autocast copy of the largest weight"] = experts * compute.itemsize
    yield f"memory per GPU, {parameters / 1e9:.3f} billion parameters, activations not counted:"
    for what, size in rows.items():
        yield f"  {size / _GIB:10.2f} GiB  {what}"
    yield f"  {sum(rows.values()) / _GIB:10.2f} GiB  in total"
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        yield f"  {total / _GIB:10.2f} GiB  on this GPU"


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.rstrip().splitlines())

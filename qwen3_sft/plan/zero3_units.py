"""What DeepSpeed's ZeRO-3 gathers as one unit, and the limits that fit such a unit.

Transformers keeps the experts of a layer in two fused tensors, gate_up_proj (E, 2F, D) and
down_proj (E, D, F): in Qwen3-30B-A3B 402.7 M and 201.3 M elements of a layer's 623.1 M. The
well-known stage3_module_granularity_threshold 1175567 was the value of a block of 128 separate
experts; today it selects nothing, and the value DeepSpeed then advises selects attention.

The unit shipped is the whole decoder layer, by class name. An MoE block as the unit leaves seven
small modules around it that are each gathered on their own and, with activation checkpointing,
once more in the backward pass, and it is 97% of the layer's elements anyway. A name is right for
every model size; a threshold is not, since a model below 1e9 parameters becomes one unit as a
whole (config/zero3_threshold.json ships one for Qwen3-30B-A3B). A threshold above 0 also switches
DeepSpeed's fast_sharding_for_leaf_module on, which was made for thousands of tensors.

Numbers in config/deepspeed/zero3*.json, for Qwen3-30B-A3B (recomputed by
tests/plan/test_zero3_units.py):

- stage3_param_persistence_threshold 262144: the router (E x D). Routers and norms stay whole on
  every GPU, 12.8 M elements in all; the next larger tensor, k_proj, is sharded.
- stage3_prefetch_bucket_size 622854144: what is gathered of one layer. Prefetching goes on until
  this many elements are on their way. With less, a part of the next layer is waited for; with
  more, the first tensors of the layer after it come too, and a fused one is 0.8 GB in bfloat16.
  "auto" means 0.9 x hidden_size squared = 3.8 M: a single projection.
- stage3_max_live_parameters 2000000000: this layer and the next, embedding and head.
- stage3_max_reuse_distance 622854144: the last layer stays for the backward pass, which uses it
  next; the one before it does not.
- reduce_bucket_size 50000000: holds the gradients of a layer without its experts (19.1 M). A
  tensor larger than the bucket is reduced where it lies, without a copy. Stage 2 copies, so that
  its bucket, 500000000, holds the largest tensor.
- grad_accum_dtype fp32: micro-batches are added in float32, as on every other engine here;
  DeepSpeed's default is the dtype of the weights.
- sub_group_size 250000000: elements of a shard updated at once. Their gradients exist in float32
  meanwhile, 1 GB.
"""

from __future__ import annotations

import sys
import types
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn

from qwen3_sft.distributed.engine import require_deepspeed
from qwen3_sft.errors import UsageError
from qwen3_sft.families.family import family_of


class Unit(NamedTuple):
    """Modules of one class whose weights are gathered together."""

    name: str
    count: int
    parameters: int


def describe(units: list[Unit]) -> str:
    """Return the units in one line for the log."""
    words = [f"{u.count} x {u.name} of {u.parameters / 1e6:.1f} M parameters" for u in units]
    return f"ZeRO-3 units: {', '.join(words) or 'none, each module on its own'}"


def check_zero3(model: nn.Module, config: Mapping[str, Any]) -> list[Unit]:
    """Return the units after checking that they and the limits suit the model.

    Args:
        model: on the meta device; it is left unchanged.
        config: DeepSpeed's, "auto" values included.

    Raises:
        UsageError: an MoE block is in no unit or many are in one, or a limit is smaller than a unit
            needs; the message names a value that works.
    """
    leaves = _leaves(model, config)
    units = _count(leaves)
    blocks = set(_moe_blocks(model))
    inside = [sum(module in blocks for module in leaf.modules()) for leaf in leaves]
    if max(inside, default=0) > 1:
        raise UsageError(f"{describe(units)}: several MoE blocks in one unit. {_advice(model)}")
    if missing := len(blocks) - sum(inside):
        raise UsageError(
            f"{describe(units)}: {missing} MoE blocks are in none of them, so that their experts "
            f"are gathered tensor by tensor. {_advice(model)}"
        )
    _check_limits(model, leaves, config)
    return units


def granularity_threshold(model: nn.Module) -> int | None:
    """Return the smallest threshold that makes each decoder layer a unit; None if none does."""
    with _clean(model):
        _granularity(model)
        values = [_measured(layer) for layer in _moe_layers(model)]
        blocks = set(_moe_blocks(model))
        above = [
            _measured(module)
            for module in model.modules()
            if sum(inner in blocks for inner in module.modules()) > 1
        ]
    return max(values) if values and max(values) < min(above, default=sys.maxsize) else None


def _count(leaves: list[nn.Module]) -> list[Unit]:
    sizes = Counter((type(leaf).__name__, _elements(leaf)) for leaf in leaves)
    return [Unit(name, count, size) for (name, size), count in sizes.items()]


def _leaves(model: nn.Module, config: Mapping[str, Any]) -> list[nn.Module]:
    require_deepspeed()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.utils.z3_leaf_module import apply_zero_leaf_module_config

    zero = DeepSpeedZeroConfig(**config["zero_optimization"])
    threshold = zero.module_granularity_threshold
    with _clean(model):
        apply_zero_leaf_module_config(model, zero.leaf_module)
        if threshold > 0 and (probe := _granularity(model)).min_granularity_value <= threshold:
            DeepSpeedZeRoOffload._set_leaf_by_threshold_preorder(probe, model, threshold)
        return list(_outermost(model))


def _granularity(model: nn.Module) -> Any:
    """Have DeepSpeed measure every module; it wants `self` only for what stands here."""
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

    probe = types.SimpleNamespace(
        min_granularity_value=sys.maxsize,
        min_granularity_layer=None,
        granularity_info=set(),
        z3_leaf_layers=[],
    )
    for name in ("_get_granularity_recursively", "_set_leaf_by_threshold_preorder"):
        setattr(probe, name, types.MethodType(getattr(DeepSpeedZeRoOffload, name), probe))
    probe._get_granularity_recursively(model)
    return probe


def _measured(module: nn.Module) -> int:
    return vars(module)["ds_model_granularity"]


@contextmanager
def _clean(model: nn.Module) -> Iterator[None]:
    """Give parameters the size that DeepSpeed reads, and take all of its marks off again."""
    for parameter in model.parameters():
        parameter.ds_numel = parameter.numel()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for parameter in model.parameters():
            vars(parameter).pop("ds_numel", None)
        for module in model.modules():
            for mark in ("_z3_leaf", "ds_model_granularity"):
                vars(module).pop(mark, None)


def _outermost(module: nn.Module) -> Iterator[nn.Module]:
    """Yield marked modules; below one, DeepSpeed puts no hooks."""
    if vars(module).get("_z3_leaf", False):
        yield module
        return
    for child in module.children():
        yield from _outermost(child)


def _moe_blocks(model: Any) -> list[nn.Module]:
    return list(family_of(model.config).architecture.blocks_in(model).values())


def _moe_layers(model: nn.Module) -> list[nn.Module]:
    blocks = set(_moe_blocks(model))
    return [m for m in model.modules() if any(child in blocks for child in m.children())]


def _advice(model: nn.Module) -> str:
    names = sorted({type(layer).__name__ for layer in _moe_layers(model)})
    quoted = ", ".join(f'"{name}"' for name in names)
    advice = f"Set zero_optimization.leaf_module.classes to [{quoted}]"
    threshold = granularity_threshold(model)
    if threshold is None:
        return f"{advice} and leave stage3_module_granularity_threshold out"
    return f"{advice}, or stage3_module_granularity_threshold to {threshold}"


def _check_limits(model: Any, leaves: list[nn.Module], config: Mapping[str, Any]) -> None:
    hidden = model.config.get_text_config().hidden_size
    persistent = _limit(config, "param_persistence_threshold", 10 * hidden)
    unit = max((_elements(leaf, above=persistent) for leaf in leaves), default=0)
    ends = {id(e.weight): e.weight for e in _ends(model)}.values()
    needed = {
        "prefetch_bucket_size": (unit, int(0.9 * hidden * hidden)),
        "max_live_parameters": (2 * unit + sum(weight.numel() for weight in ends), 0),
    }
    for name, (least, auto) in needed.items():
        if (value := _limit(config, name, auto)) < least:
            raise UsageError(
                f"stage3_{name} {value} is too small for units of {unit} sharded parameters; "
                f"set it to {least} or more in the DeepSpeed config"
            )


def _limit(config: Mapping[str, Any], name: str, auto: int) -> int:
    """Return a limit: as set, as transformers fills "auto" in, or DeepSpeed's default."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    if config["zero_optimization"].get(f"stage3_{name}") == "auto":
        return auto
    return int(getattr(DeepSpeedZeroConfig(**config["zero_optimization"]), name))


def _ends(model: Any) -> list[Any]:
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return [end for end in ends if end is not None]


def _elements(module: nn.Module, above: int = 0) -> int:
    return sum(p.numel() for p in module.parameters() if p.numel() > above)

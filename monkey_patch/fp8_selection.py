"""Which modules compute in FP8, which stay as they are and why, and what share of the work that is.

A module is kept for what it is (router, norm, embedding, lm_head, vision tower), for where it
stands (first and last decoder layer, as a whole), because a pattern names it, or because nobody
asked for its half. What is left is converted, and nothing left is an error: a run that asks for
FP8 and multiplies in bfloat16 would only be slower to find out.

"First and last" are decoder layers, not the first and the last nn.Linear, which would be one
projection of layer 0 and lm_head.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from monkey_patch.architectures import Architecture, architecture_of
from monkey_patch.core import PatchError, class_name

# _scaled_mm wants rows of this many bytes, which in FP8 are elements.
_WIDTH = 16
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

FIRST, LAST = "first decoder layer", "last decoder layer"
NOT_ASKED_FOR = "not asked for"


@dataclass(frozen=True)
class Selection:
    """What computes in FP8.

    Attributes:
        converted: names of modules, nn.Linear and experts, in the order of the model.
        kept: name of every other module that owns parameters -> why.
        share: of the linear FLOPs of a token, those of `converted`; 0 to 1. Linear FLOPs are the
            matrix products with weights in the text model: of the experts the top_k that a token
            visits, lm_head at every token, neither attention's scores nor a vision tower.
        kept_shares: reason -> its share; with `share` they add up to 1.
        num_layers: decoder layers in which something is converted.
    """

    converted: tuple[str, ...]
    kept: dict[str, str]
    share: float
    kept_shares: dict[str, float]
    num_layers: int


def select(
    model: nn.Module, *, attention: bool, experts: bool, keep: Sequence[str] = ()
) -> Selection:
    """Choose the modules of `model` that compute in FP8.

    Args:
        model: a Hugging Face causal or image-text model, or a module that contains one; its
            weights may be sharded.
        attention: convert every nn.Linear of the decoder layers, of which a mixture of experts has
            attention's q, k, v and o projections and, where layers are dense, their MLP.
        experts: convert the experts modules.
        keep: shell patterns (`*`, `?`, `[...]`; `*` matches dots too). A pattern keeps each module
            whose name it matches, with everything inside.

    Raises:
        PatchError: a pattern matches nothing, nothing is left to convert, or a module that would
            be converted is an adapter's, is quantised, or has a width that is no multiple of 16.
    """
    architecture = architecture_of(model)
    text = _text_model(model)
    layers = _decoder_layers(model, text, architecture)
    kept_by_pattern = _matches(model, keep)
    kept: dict[str, str] = {}
    converted: dict[str, int] = {}
    flops: Counter[str] = Counter()
    top_k = getattr(text.config, "num_experts_per_tok", 1)
    for name, module in _owners_of_parameters(model):
        layer = next((i for i, n in enumerate(layers) if name.startswith(f"{n}.")), None)
        reason = _reason(name, module, layer, len(layers), architecture)
        reason = reason or kept_by_pattern.get(name)
        asked_for = experts if class_name(module) in architecture.experts else attention
        reason = reason or (None if asked_for else NOT_ASKED_FOR)
        if reason is None and layer is not None:
            _refuse_unfit(model, name, module)
            converted[name] = layer
        elif reason is not None:
            kept[name] = reason
        if reason != "vision tower":
            flops[reason or ""] += _flops(module, top_k, architecture)
    if not converted:
        raise PatchError(_why_nothing(type(model).__name__, len(layers), kept))
    total = sum(flops.values())
    shares = {reason: count / total for reason, count in flops.items()}
    return Selection(
        tuple(converted), kept, shares.pop(""), shares, num_layers=len(set(converted.values()))
    )


def describe(selection: Selection) -> str:
    """Return one line: the share that is converted, and what is kept with its shares."""
    shares = sorted(selection.kept_shares.items(), key=lambda item: -item[1])
    kept = ", ".join(f"{reason} {share:.1%}" if share else reason for reason, share in shares)
    layers = f"{selection.num_layers} layer{'s' * (selection.num_layers != 1)}"
    return f"FP8: {selection.share:.1%} of linear FLOPs in {layers}; BF16: {kept}"


def _text_model(model: nn.Module) -> Any:
    modules: Iterator[Any] = model.modules()
    for module in modules:
        if hasattr(module, "get_decoder"):
            return module.get_decoder()
    raise PatchError(f"{type(model).__name__} contains no Hugging Face model with decoder layers")


def _decoder_layers(model: nn.Module, text: Any, architecture: Architecture) -> list[str]:
    """Return the names of the text model's decoder layers in their order."""
    inside = {id(module) for module in text.modules()}
    layers = architecture.layers_in(model)
    return [name for name, module in layers.items() if id(module) in inside]


def _owners_of_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if any(parameter is not None for parameter in module._parameters.values()):
            yield name, module


def _reason(
    name: str, module: nn.Module, layer: int | None, num_layers: int, architecture: Architecture
) -> str | None:
    """Return why a module is kept whatever was asked for."""
    kind, parts = class_name(module), name.split(".")
    if not set(architecture.vision).isdisjoint(parts):
        return "vision tower"
    if kind in architecture.routers or parts[-1] == "gate":
        return "router"
    if "Norm" in kind:
        return "norm"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if layer is None:
        return "lm_head" if parts[-1] == "lm_head" else "outside the decoder layers"
    if layer == 0:
        return FIRST
    if layer == num_layers - 1:
        return LAST
    if any(fnmatchcase(name, pattern) for pattern in architecture.fp8_keep):
        return "unfit for FP8"
    if not isinstance(module, nn.Linear) and kind not in architecture.experts:
        return f"{kind}, which FP8 does not know"
    return None


def _matches(model: nn.Module, keep: Sequence[str]) -> dict[str, str]:
    """Return module name -> reason for the modules that a pattern names or lies around."""
    names = [name for name, _ in model.named_modules() if name]
    found: dict[str, str] = {}
    for pattern in keep:
        named = {name for name in names if fnmatchcase(name, pattern)}
        if not named:
            raise PatchError(
                f"the pattern {pattern!r} of modules to keep in BF16 matches none; write it like "
                f"{names[len(names) // 2]!r}, with * for any characters"
            )
        for name in names:
            parts = name.split(".")
            if any(".".join(parts[: i + 1]) in named for i in range(len(parts))):
                found.setdefault(name, f"keep pattern {pattern!r}")
    return found


def _refuse_unfit(model: nn.Module, name: str, module: nn.Module) -> None:
    """Refuse what cannot be converted, rather than keep it and convert less than was asked for."""
    remedy = f"or keep it in BF16 by a pattern such as {name!r}"
    parts = name.split(".")
    for i in range(1, len(parts)):
        if "base_layer" in model.get_submodule(".".join(parts[:i]))._modules:
            raise PatchError(
                f"{name} belongs to an adapter layer; apply FP8 before adapters are added, {remedy}"
            )
    for key, weight in module.named_parameters(recurse=False):
        packed = is_traceable_wrapper_subclass(weight) and not isinstance(weight, DTensor)
        if packed or weight.dtype not in _DTYPES:
            raise PatchError(
                f"{name}.{key} is {type(weight).__name__ if packed else weight.dtype}; FP8 needs "
                f"weights in bfloat16, float16 or float32: load without quantisation, {remedy}"
            )
    if not isinstance(module, nn.Linear):
        return
    if class_name(module) not in ("Linear", "NonDynamicallyQuantizableLinear"):
        raise PatchError(
            f"{name} is {class_name(module)}, which multiplies in its own way; load the model with "
            f"plain linear layers, {remedy}"
        )
    for width in (module.in_features, module.out_features):
        if width % _WIDTH:
            raise PatchError(
                f"{name} is {module.in_features} wide inside and {module.out_features} outside; "
                f"{width} is no multiple of {_WIDTH}, which FP8 products need: leave out FP8 for "
                f"attention, {remedy}"
            )


def _flops(module: Any, top_k: int, architecture: Architecture) -> int:
    """Return the FLOPs of a token's matrix products with the module's own weights."""
    if isinstance(module, nn.Linear):
        return 2 * module.in_features * module.out_features
    if class_name(module) in architecture.experts:
        return 2 * 3 * top_k * module.hidden_dim * module.intermediate_dim
    if class_name(module) in architecture.routers:
        return 2 * module.num_experts * module.hidden_dim
    return 0


def _why_nothing(model: str, num_layers: int, kept: dict[str, str]) -> str:
    start = f"FP8 would convert nothing in {model}"
    if num_layers <= 2:
        return (
            f"{start}: it has {num_layers} decoder layer{'s' * (num_layers != 1)}, and the first "
            "and the last stay in BF16; it takes 3 layers or more"
        )
    reasons = Counter(kept.values())
    inside = ", ".join(f"{count} modules: {reason}" for reason, count in reasons.items())
    return f"{start} ({inside}); keep fewer modules, or leave FP8 off"

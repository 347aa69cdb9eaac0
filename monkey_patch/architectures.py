"""What the patches know of a model's modules: the names of its classes, and who tells them.

A model whose text config has the `model_type` of a registered `Architecture` is read by that one's
names. Any other is read by its structure (`architecture_of`), so that a patch serves every
mixture of experts of transformers that it would not get wrong. Further architectures are added by
`register`; importing this module needs neither torch nor transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Architecture:
    """Names of classes of one architecture, as transformers spells them.

    Attributes:
        model_types: of the text config.
        layers: the decoder layers.
        blocks: a router with its experts.
        experts: what `use_experts_implementation` decorates.
        routers: their forward is linear, float32 softmax, top-k, optional renormalisation.
        decoders: text decoders that hand position_ids and cu_seq_lens on to attention, which alone
            mixes tokens; none where packed documents would meet elsewhere.
        causal_lms: models with a `model` and an `lm_head` whose loss is the plain cross entropy.
        vision_layers: layers of the vision tower.
        vision: names of the modules that hold the vision tower.
        fp8_keep: shell patterns of the names of modules that FP8 would get wrong.
    """

    model_types: tuple[str, ...]
    layers: tuple[str, ...]
    blocks: tuple[str, ...]
    experts: tuple[str, ...]
    routers: tuple[str, ...]
    decoders: tuple[str, ...] = ()
    causal_lms: tuple[str, ...] = ()
    vision_layers: tuple[str, ...] = ()
    vision: tuple[str, ...] = ()
    fp8_keep: tuple[str, ...] = ()

    def layers_in(self, model: nn.Module) -> dict[str, nn.Module]:
        """Return the decoder layers by name, in their order."""
        return _called(model, self.layers)

    def experts_in(self, model: nn.Module) -> dict[str, nn.Module]:
        """Return the experts modules by name, in the order of their layers."""
        return _called(model, self.experts)

    def blocks_in(self, model: nn.Module) -> dict[str, nn.Module]:
        """Return the blocks by name, in the order of their layers."""
        return _called(model, self.blocks)

    def units_in(self, model: nn.Module) -> dict[str, nn.Module]:
        """Return what is sharded and gathered as one: the layers of the decoder and the tower."""
        return _called(model, self.layers + self.vision_layers)


QWEN3_MOE = Architecture(
    model_types=("qwen3_moe",),
    layers=("Qwen3MoeDecoderLayer",),
    blocks=("Qwen3MoeSparseMoeBlock",),
    experts=("Qwen3MoeExperts",),
    routers=("Qwen3MoeTopKRouter",),
    decoders=("Qwen3MoeModel",),
    causal_lms=("Qwen3MoeForCausalLM",),
)
QWEN3_VL_MOE = Architecture(
    model_types=("qwen3_vl_moe_text",),
    layers=("Qwen3VLMoeTextDecoderLayer",),
    blocks=("Qwen3VLMoeTextSparseMoeBlock",),
    experts=("Qwen3VLMoeTextExperts",),
    routers=("Qwen3VLMoeTextTopKRouter",),
    decoders=("Qwen3VLMoeTextModel",),
    causal_lms=("Qwen3VLMoeForConditionalGeneration",),
    vision_layers=("Qwen3VLMoeVisionBlock",),
    vision=("visual",),
)
# The two hybrids keep a gate of one column, and the narrow projections that steer a recurrence.
QWEN3_NEXT = Architecture(
    model_types=("qwen3_next",),
    layers=("Qwen3NextDecoderLayer",),
    blocks=("Qwen3NextSparseMoeBlock",),
    experts=("Qwen3NextExperts",),
    routers=("Qwen3NextTopKRouter",),
    fp8_keep=("*.shared_expert_gate", "*.in_proj_ba"),
)
QWEN3_5_MOE = Architecture(
    model_types=("qwen3_5_moe_text",),
    layers=("Qwen3_5MoeDecoderLayer",),
    blocks=("Qwen3_5MoeSparseMoeBlock",),
    experts=("Qwen3_5MoeExperts",),
    routers=("Qwen3_5MoeTopKRouter",),
    vision_layers=("Qwen3_5MoeVisionBlock",),
    vision=("visual",),
    fp8_keep=("*.shared_expert_gate", "*.in_proj_a", "*.in_proj_b"),
)

# Routers of models that are not registered, compared in transformers 5.23.
_OTHER_ROUTERS = ("Qwen2MoeTopKRouter", "Qwen3OmniMoeThinkerTextTopKRouter", "OlmoeTopKRouter")

_registered: list[Architecture] = [QWEN3_MOE, QWEN3_VL_MOE, QWEN3_NEXT, QWEN3_5_MOE]


def register(architecture: Architecture) -> None:
    """Make the patches know an architecture; a second time does nothing."""
    if architecture not in _registered:
        _registered.append(architecture)


def architecture_of(model: nn.Module) -> Architecture:
    """Return the names of a model's classes: registered, or read off what transformers marks.

    Of a model that is not registered, layers are what transformers does not split over devices,
    experts what its decorator marks, routers and blocks what is called so. `decoders` and
    `causal_lms` stay empty: whether a forward can be replaced does not show in its structure.

    Args:
        model: a Hugging Face model, or a module that contains one.
    """
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if not hasattr(config, "get_text_config"):
            continue
        model_type = config.get_text_config().model_type
        for architecture in _registered:
            if model_type in architecture.model_types:
                return architecture
        break
    return _by_structure(model)


def packed_model_types() -> tuple[str, ...]:
    """Return the model types whose decoders keep packed documents apart in attention alone."""
    return tuple(name for known in _registered if known.decoders for name in known.model_types)


def softmax_routers() -> tuple[str, ...]:
    """Return the classes of all routers that were compared, whatever the model."""
    return tuple(name for known in _registered for name in known.routers) + _OTHER_ROUTERS


def _by_structure(model: nn.Module) -> Architecture:
    from monkey_patch.core import class_name

    modules = list(model.modules())
    kinds = {class_name(module) for module in modules}
    decorated = (m for m in modules if hasattr(type(m), "_apply_gate"))
    return Architecture(
        model_types=(),
        layers=tuple(
            {name for m in modules for name in getattr(m, "_no_split_modules", None) or ()}
        ),
        blocks=tuple(kind for kind in kinds if kind.endswith("SparseMoeBlock")),
        experts=tuple({class_name(m) for m in decorated if hasattr(m, "is_concatenated")}),
        routers=tuple(kind for kind in kinds if kind.endswith("Router")),
        vision=("visual", "vision_tower", "vision_model"),
    )


def _called(model: nn.Module, kinds: tuple[str, ...]) -> dict[str, nn.Module]:
    from monkey_patch.core import class_name

    return {name: module for name, module in model.named_modules() if class_name(module) in kinds}

"""How large a model and its parts are, which may be on the meta device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from qwen3_sft.families.family import family_of


@dataclass(frozen=True)
class Sizes:
    """Elements of a model, of its largest tensor, layer, experts of a layer and embedding.

    And of all layers without their experts, and of all experts.
    """

    model: int
    tensor: int
    layer: int
    layer_experts: int
    end: int
    dense: int
    experts: int

    @classmethod
    def of(cls, model: Any) -> Sizes:
        """Measure a model, which may be on the meta device.

        Raises:
            ModelError: no family has its `model_type`.
        """
        architecture = family_of(model.config).architecture
        layers = architecture.units_in(model).values()
        experts = architecture.experts_in(model).values()
        all_experts = sum(map(_elements, experts))
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        return cls(
            model=_elements(model),
            tensor=max(p.numel() for p in model.parameters()),
            layer=max(_elements(layer) for layer in layers),
            layer_experts=max(map(_elements, experts), default=0),
            end=max(_elements(end) for end in ends if end is not None),
            dense=sum(map(_elements, layers)) - all_experts,
            experts=all_experts,
        )


def local_shapes(model: nn.Module, shards: int) -> list[tuple[int, ...]]:
    """Return the shapes of the parameters on one of `shards` GPUs that divide first dimensions."""
    return [(-(-p.shape[0] // shards), *p.shape[1:]) for p in model.parameters()]


def _elements(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())

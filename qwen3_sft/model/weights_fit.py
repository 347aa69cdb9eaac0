"""Names and shapes in the shards' headers against the model of config.json, before data is read.

Reading the weights comes to the same verdict, but after the data has been tokenised. Experts may
lie one by one or fused: the names go the way on which transformers would load them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

from qwen3_sft.errors import ModelError
from qwen3_sft.model.base_files import Header

_SHOWN = 5
# Buffers that older versions of transformers saved; it skips them too.
_SKIPPED = re.compile(r"rotary_emb\.inv_freq$|(^|\.)position_ids$")
_Shapes = dict[str, torch.Size]


def check_fit(model: PreTrainedModel, headers: Mapping[str, Header], where: object) -> None:
    """Refuse weights that are missing, of another shape, or none of the model's.

    Args:
        model: on the meta device.
        headers: of all shards.
        where: of the weights, for the message.

    Raises:
        ModelError: naming up to five of each kind.
    """
    targets = model.state_dict()
    names = _Names(model, targets)
    wanted: dict[str, _Shapes] = defaultdict(dict)  # of each tensor, by their names on the hub
    for name, part in revert_weight_conversion(model, targets).items():
        wanted[names.target(name)[0]][name] = part.shape
    found: dict[str, _Shapes] = defaultdict(dict)
    for name, header in headers.items():
        target, is_part = names.target(name)
        if target in targets and not is_part:
            wanted[target] = {name: targets[target].shape}  # fused, or only renamed
        found[target][names.whole(name, wanted[target])] = torch.Size(header.shape)
    _refuse_differences(wanted, found, set(model.all_tied_weights_keys), where)


class _Names:
    """How transformers takes the names of a checkpoint for those of a model."""

    def __init__(self, model: PreTrainedModel, targets: Mapping[str, object]) -> None:
        changes = get_model_conversion_mapping(model)
        self._renamings = [change for change in changes if isinstance(change, WeightRenaming)]
        self._converters = [change for change in changes if isinstance(change, WeightConverter)]
        self._prefix, self._targets = model.base_model_prefix, dict(targets)

    def target(self, name: str) -> tuple[str, bool]:
        """Return the model's tensor that one of a checkpoint goes into, and whether as a part."""
        target, pattern = rename_source_key(
            name, self._renamings, self._converters, self._prefix, self._targets
        )
        return target, pattern is not None

    def whole(self, name: str, wanted: _Shapes) -> str:
        """Return the name with the prefix that checkpoints of the decoder alone leave out."""
        prefixed = f"{self._prefix}.{name}"
        return prefixed if prefixed in wanted and name not in wanted else name


def _refuse_differences(
    wanted: dict[str, _Shapes], found: dict[str, _Shapes], tied: set[str], where: object
) -> None:
    expected = {name: shape for shapes in wanted.values() for name, shape in shapes.items()}
    given = {name: shape for shapes in found.values() for name, shape in shapes.items()}
    optional = {name for target in tied for name in wanted[target]}
    problems = {
        "missing": [name for name in expected if name not in given and name not in optional],
        "unexpected": [
            name for name in given if name not in expected and not _SKIPPED.search(name)
        ],
        "of another shape": [
            f"{name} {tuple(given[name])}, not {tuple(expected[name])}"
            for name in expected.keys() & given.keys()
            if given[name] != expected[name]
        ],
    }
    told = [
        f"{len(names)} {what}: {', '.join(sorted(names)[:_SHOWN])}"
        for what, names in problems.items()
        if names
    ]
    if told:
        raise ModelError(
            f"{where}: the weights do not fit config.json ({'; '.join(told)}): the one or the "
            "other is of another model or not whole"
        )

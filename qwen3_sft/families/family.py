"""A family of models as one value: what it is called, how it is built, what it can do here.

How to add a family: one new file in this folder with a `FAMILY`. Nothing else lists it: the files
are found by looking, and the patches learn its `Architecture` with it. While it cannot be trained,
`capabilities` refuses it with a sentence that says what it is and what to use instead.

What does not come from that file and has to suit it: the formulas of `plan/activations.py`, the
chat format of its tokenizer (`chat/templates.py`), and the launch files in `config/`, which name
the layers that FSDP and ZeRO-3 gather.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, Literal

import qwen3_sft.families
from monkey_patch.architectures import Architecture, register
from qwen3_sft.errors import FlopsError, ModelError
from qwen3_sft.families.flops import ModelFlops, ParameterCount

Capability = Literal["train"]
SUPPORTED = ""


def not_counted(config: Any) -> Any:
    """Refuse to count the FLOPs or parameters of a family that has no formula yet.

    Raises:
        FlopsError: always.
    """
    raise FlopsError(f"{type(config).__name__}: nobody has written down how to count it")


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        name: in words.
        model_types: of config.json, and of the text config within it.
        architecture: the names of its modules' classes.
        capabilities: what it can do: `SUPPORTED`, or the sentence that refuses it.
        auto_class: of transformers, which builds and loads the whole model.
        hub_names: shell patterns of the repositories of released models.
        known_configs: repository -> the sizes in its config.json, for plans without a network.
        chat_formats: names in `chat.templates.CHAT_FORMATS` of the released models.
        count_flops: config -> the FLOPs of its parts.
        count_parameters: text config -> all and active parameters.
    """

    name: str
    model_types: tuple[str, ...]
    architecture: Architecture
    capabilities: Mapping[Capability, str]
    auto_class: str = "AutoModelForCausalLM"
    hub_names: tuple[str, ...] = ()
    known_configs: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    chat_formats: tuple[str, ...] = ()
    count_flops: Callable[[Any], ModelFlops] = not_counted
    count_parameters: Callable[[Any], ParameterCount] = not_counted


@cache
def families() -> tuple[Family, ...]:
    """Return every family that has a file here, and make the patches know them."""
    package = qwen3_sft.families
    names = sorted(module.name for module in iter_modules(package.__path__))
    modules = [vars(import_module(f"{package.__name__}.{name}")) for name in names]
    found = tuple(module["FAMILY"] for module in modules if "FAMILY" in module)
    for family in found:
        register(family.architecture)
    return found


def family_of(config: Any, where: object = "") -> Family:
    """Return the family of a model.

    Args:
        config: of the model, its text config, or a `model_type`.
        where: what the message of an error begins with; the config's class by default.

    Raises:
        ModelError: no family has this `model_type`.
    """
    is_config = hasattr(config, "model_type")
    model_type = config.model_type if is_config else config
    for family in families():
        if model_type in family.model_types:
            return family
    trained = [f.model_types[0] for f in families() if f.capabilities["train"] == SUPPORTED]
    raise ModelError(
        f"{where or type(config).__name__}: model_type is {model_type!r}; this project trains "
        f"{', '.join(trained)}"
    )


def require(capability: Capability, config: Any, where: object) -> Family:
    """Return the family of a model after checking that it can do something.

    Args:
        capability: what it is to do.
        config: as in `family_of`.
        where: likewise.

    Raises:
        ModelError: the family cannot, or no family has this `model_type`.
    """
    family = family_of(config, where)
    _check(capability, family, where)
    return family


def require_by_name(capability: Capability, name: str) -> None:
    """Refuse a model of the hub by its name, before its config.json is here.

    Raises:
        ModelError: it belongs to a family that cannot. An unknown name passes.
    """
    for family in families():
        if any(fnmatchcase(name, pattern) for pattern in family.hub_names):
            _check(capability, family, name)


def _check(capability: Capability, family: Family, where: object) -> None:
    if sentence := family.capabilities[capability]:
        raise ModelError(f"{where}: {sentence}")

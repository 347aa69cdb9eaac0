"""What a test must leave as it was: the models' modules of transformers, shared by the process."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

PREFIX = "transformers.models.qwen3"  # all families; Liger replaces names and forwards there


class Upstream:
    """The modules as they are now; those that are imported later are not compared."""

    def __init__(self) -> None:
        self._before = {module: _content(module) for module in _modules()}

    def restore(self) -> list[str]:
        """Put everything back; return what had changed."""
        changed = []
        for module, before in self._before.items():
            now = _content(module)
            for key, value in before.items():
                if now.get(key) is not value:
                    owner, name = key
                    changed.append(f"{owner.__name__}.{name}")
                    setattr(owner, name, value)
        return changed


def _modules() -> list[ModuleType]:
    return [
        module for name, module in list(sys.modules.items())
        if name.startswith(PREFIX) and ".modeling_" in name
    ]  # fmt: skip


def _content(module: ModuleType) -> dict[tuple[Any, str], Any]:
    """Return the names of a module, and the forward of each of its classes."""
    content: dict[tuple[Any, str], Any] = {
        (module, name): value for name, value in vars(module).items() if not name.startswith("__")
    }
    for value in list(content.values()):
        if isinstance(value, type) and "forward" in vars(value):
            content[value, "forward"] = vars(value)["forward"]
    return content

"""Options whose values nobody else may read: they reach no log and no file of a run."""

from __future__ import annotations

import re
from collections.abc import Sequence

_SECRET = re.compile(r"(token|password|secret|api_?key)$")
MASK = "***"


def is_secret(option: str) -> bool:
    """Whether an option of this name, with or without dashes, holds a secret: `hub_token` does."""
    return _SECRET.search(option.replace("-", "_").lower()) is not None


def masked(command: Sequence[str]) -> list[str]:
    """Return a command line to be printed, with the values of secret options replaced."""
    shown: list[str] = []
    hides_next = False
    for word in command:
        name, equals, _ = word.partition("=")
        is_option = word.startswith("--")
        if hides_next and not is_option:
            shown.append(MASK)
            continue
        hides_next = is_option and is_secret(name) and not equals
        shown.append(f"{name}={MASK}" if is_option and equals and is_secret(name) else word)
    return shown

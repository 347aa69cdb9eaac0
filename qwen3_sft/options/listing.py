"""Every option as data: what argparse and a help text need of it, without importing transformers.

`listing.json` is made from the dataclasses by `python -m tests.options.test_listing`; a test holds
it to them. Reading it takes a millisecond, importing TrainingArguments takes seconds, which nobody
shall wait for who asks for help or has misspelt an option.
"""

from __future__ import annotations

import json
from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

FILE = Path(__file__).with_name("listing.json")


@dataclass(frozen=True)
class Listed:
    """An option.

    Attributes:
        kind: what one value is.
        default: if it is not given.
        help: what it does.
        choices: the only values it takes; empty where there are others.
        nargs: `+` of a list; `?` where the name alone means true.
        nullable: whether a recipe may set it to null.
        is_mapping: whether a recipe may give it a mapping, which becomes JSON.
        is_ours: whether this project declares it, and not transformers alone.
    """

    kind: Literal["int", "float", "str", "switch"]
    default: Any = None
    help: str = ""
    choices: Sequence[str] = ()
    nargs: Literal["+", "?"] | None = None
    nullable: bool = False
    is_mapping: bool = False
    is_ours: bool = False

    @property
    def reads(self) -> Callable[[str], Any]:
        """What makes a value of a word, for argparse."""
        return {"int": int, "float": float, "str": str, "switch": switch}[self.kind]


@cache
def listing() -> dict[str, Listed]:
    """Return every option by name, in the order of the dataclasses."""
    entries: dict[str, dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8"))
    return {name: Listed(**entry) for name, entry in entries.items()}


def switch(word: str) -> bool:
    """Read a switch as HfArgumentParser does.

    Raises:
        ArgumentTypeError: it is neither.
    """
    if (lower := word.lower()) in ("yes", "true", "t", "y", "1"):
        return True
    if lower in ("no", "false", "f", "n", "0"):
        return False
    raise ArgumentTypeError(f"{word!r} is neither true nor false")

"""Canonical samples: the one shape every file format is parsed into and every later step reads."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

import numpy as np

from qwen3_sft.errors import DataError

Role = Literal["system", "user", "assistant", "tool"]
IGNORED = -100  # the label torch's cross entropy skips


@dataclass(frozen=True, slots=True)
class Dropped:
    """A row left out on purpose; the reader counts the reasons."""

    reason: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One function call of an assistant; the arguments keep the order of the file."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn.

    Attributes:
        role: as chat templates call it.
        content: without reasoning and calls.
        reasoning: None where there is none, never an empty string.
        tool_calls: of an assistant.
        written: the content as the row has it, where the reasoning was read out of its text.
    """

    role: Role
    content: str
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    written: str | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns in order.

    Attributes:
        messages: at least one of them is an assistant's.
        tools: function descriptions as the file gave them.
        first_trained: index of the first message whose answer may carry labels.
        enable_thinking: the row's own mode, as chat templates get it: whether the model is to write
            an empty think block, not the prompt. None: it is on for the answers with reasoning.
    """

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    first_trained: int = 0
    enable_thinking: bool | None = None


@dataclass(frozen=True, slots=True)
class PlainText:
    """Text outside any chat: the prompt carries no labels; a `text` row has an empty prompt."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """A row that came tokenised: `input_ids` and `labels`, both (T,) int32.

    Labels stand at the position of their own token (not shifted) and are that token or -100.
    """

    input_ids: np.ndarray
    labels: np.ndarray

    @property
    def trained(self) -> np.ndarray:
        """Which tokens carry a label, (T,) bool."""
        return self.labels != IGNORED


Sample = Conversation | PlainText | Tokens


@dataclass(frozen=True, slots=True)
class Source:
    """Where a row stands, and what to remember about it.

    Attributes:
        location: such as ``data.jsonl:17``; every error message begins with it.
        warnings: counts by kind of oddity that is trained on all the same.
        drop_nulls: leave out null entries of tools and call arguments. Arrow and Parquet give
            every struct the union of all rows' keys, so there null means absent; in JSON it is a
            value.
    """

    location: str
    warnings: Counter[str] = field(default_factory=Counter)
    drop_nulls: bool = False

    def fail(self, problem: str) -> NoReturn:
        """Raise a DataError at this location."""
        raise DataError(f"{self.location}: {problem}")

    def warn(self, kind: str) -> None:
        """Count one oddity of this kind."""
        self.warnings[kind] += 1

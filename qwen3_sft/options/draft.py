"""The training options before anything follows from them: typed, free of effects."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from qwen3_sft.errors import UsageError
from qwen3_sft.options.train_args import TrainArguments

FIELDS = tuple(field.name for field in dataclasses.fields(TrainArguments) if field.init)


class TrainDraft(TrainArguments):
    """The fields of `TrainArguments` as a recipe and a command line give them.

    Making one checks nothing and joins no process group; `arguments` does both. What is left open
    is filled in on copies (`dataclasses.replace`).
    """

    def __post_init__(self) -> None:
        """Leave everything as it was given."""

    @property
    def _setup_devices(self) -> torch.device:
        """Upstream joins the process group when a device is asked for; a draft must not."""
        raise RuntimeError("a draft has no device and no process group: build the arguments first")

    def values(self) -> dict[str, Any]:
        """Return every option by name."""
        return {name: getattr(self, name) for name in FIELDS}

    def arguments(self) -> TrainArguments:
        """Build the TrainingArguments; this initialises the device and the process group.

        Raises:
            UsageError: if transformers or `TrainArguments` refuse a value.
        """
        try:
            return TrainArguments(**self.values())
        except ValueError as error:
            raise UsageError(str(error)) from error

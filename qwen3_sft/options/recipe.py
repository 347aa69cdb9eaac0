"""A recipe (YAML) plus a command line become typed options; `command_line.py` reads them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from qwen3_sft.errors import UsageError
from qwen3_sft.options.combinations import check_schedule
from qwen3_sft.options.command_line import Given, default_values, read_options
from qwen3_sft.options.data_args import DataArguments
from qwen3_sft.options.draft import TrainDraft
from qwen3_sft.options.model_args import ModelArguments
from qwen3_sft.options.train_args import TrainArguments
from qwen3_sft.records.secret_options import is_secret


@dataclasses.dataclass(frozen=True)
class Options:
    """All options of one run, never changed in place.

    Attributes:
        model: which model, and what computes it.
        data: where the conversations come from, and how they become rows.
        train: all others; `train.arguments()` comes last, it joins the process group.
        recipe: the file that was named, None without one.
    """

    model: ModelArguments
    data: DataArguments
    train: TrainDraft
    recipe: str | None

    @property
    def output_dir(self) -> Path:
        """The run folder."""
        return Path(str(self.train.output_dir))

    def replaced(self, **values: Any) -> Options:
        """Return a copy with other values, whichever of the three they belong to."""
        parts: dict[str, Any] = {"model": self.model, "data": self.data, "train": self.train}
        for name, part in parts.items():
            names = {field.name for field in dataclasses.fields(part)} & values.keys()
            parts[name] = dataclasses.replace(part, **{key: values.pop(key) for key in names})
        if values:
            raise TypeError(f"no options are called {sorted(values)}")
        return Options(**parts, recipe=self.recipe)

    def values(self) -> dict[str, Any]:
        """Return every option by name."""
        return {**vars(self.model), **vars(self.data), **self.train.values()}

    def resolved(self) -> dict[str, Any]:
        """Every option that differs from its default, plus model, data and output: a recipe.

        Secrets are left out: give them again, or set HF_TOKEN.
        """
        values = self.values()
        defaults = default_values()
        for name in ("dry_run", "allow_change", "trust_checkpoint", "stop_after_steps"):
            defaults[name] = values[name]  # how it was called, not part of a recipe
        always = {"model_name_or_path", "dataset", "output_dir", "max_length", "learning_rate"}
        shown = {k: v for k, v in values.items() if not is_secret(k)}
        if values["global_batch_size"] is not None:  # which a run has translated for its processes
            del shown["gradient_accumulation_steps"]
        return {k: v for k, v in shown.items() if k in always or v != defaults[k]}


def parse_options(argv: list[str], *, needs_data: bool = True) -> Options:
    """Parse `[--config RECIPE] [--flag value ...]`.

    Args:
        argv: the words.
        needs_data: whether a missing dataset is an error; a plan needs none.

    Raises:
        UsageError: as `read_options`, or the schedule's arguments do not suit it.
    """
    return typed(read_options(argv, needs_data=needs_data))


def typed(given: Given) -> Options:
    """Return the options that were given as the dataclasses they belong to.

    Raises:
        UsageError: the schedule's arguments do not suit it, or the installed transformers lacks an
            option that is set.
    """
    rest = dict(given.values)
    model, data, train = (
        {f.name: rest.pop(f.name) for f in dataclasses.fields(kind) if f.init and f.name in rest}
        for kind in (ModelArguments, DataArguments, TrainArguments)
    )
    for name, value in rest.items():
        if value != default_values()[name]:
            raise UsageError(f"--{name} {value}: the installed transformers has no such option")
    options = Options(
        ModelArguments(**model), DataArguments(**data), TrainDraft(**train), given.recipe
    )
    check_schedule(options.train)
    return options

"""What a run would do, without touching data or weights: options, engine, patches, memory.

It refuses at once what the run would refuse before it reads data; of a folder that is everything
but the rows and the values of weights, of a hub id what its config.json says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import yaml

import monkey_patch
from qwen3_sft.decisions import Machine, check_disk, check_model, check_options, decide
from qwen3_sft.errors import UserError
from qwen3_sft.model.base import checked_base
from qwen3_sft.model.loading import resolve_model
from qwen3_sft.model.meta_model import meta_model
from qwen3_sft.options.recipe import Options
from qwen3_sft.records.run_folder import RunFolder
from qwen3_sft.start_checks import check_place, check_start
from qwen3_sft.training.summary import describe_summary


def dry_run(options: Options, environment: Mapping[str, str] | None = None) -> Iterator[str]:
    """Yield the lines to print.

    Args:
        options: of the run.
        environment: what accelerate's launcher sets; the process's own by default.

    Raises:
        ModelError: the model cannot be found or trained.
        UsageError: the options contradict each other, the engine, the machine or the model.
        DoesNotFitError: after the last line, if the GPU's memory does not suffice.
    """
    folder = RunFolder(options.output_dir)
    summary = check_start(folder, options)
    yield "options (a recipe that runs again):"
    yield _indent(yaml.safe_dump(options.resolved(), sort_keys=False, allow_unicode=True))
    if summary is not None:
        yield describe_summary(folder, summary)
    machine = Machine.here(options.train)
    yield from _not_here(lambda: check_place(options))
    check_options(options, machine, environment)
    name = options.model.model_name_or_path
    if Path(name).is_dir():
        model = checked_base(resolve_model(name)).model
    else:
        model = meta_model(name, options.model.model_revision)
    decisions = decide(options, model, machine, environment)
    check_model(decisions, model)
    yield from _not_here(lambda: check_disk(decisions, model))
    monkey_patch.apply_patches(model, decisions.patches)  # logs each one
    yield from decisions.lines()
    if decisions.advice_line:
        yield decisions.advice_line
    decisions.plan.check()


def _not_here(check: Callable[[], None]) -> Iterator[str]:
    """Yield what a run here would end with at once: recipes are looked at on other machines too."""
    try:
        check()
    except UserError as error:
        yield f"not on this machine: {error}"


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.rstrip().splitlines())

"""What a run would do, without touching data or weights: options, engine, patches, memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import yaml

import monkey_patch
from qwen3_sft.decisions import Machine, decide
from qwen3_sft.model.meta_model import meta_model
from qwen3_sft.options.recipe import Options
from qwen3_sft.records.run_folder import RunFolder
from qwen3_sft.start_checks import check_start
from qwen3_sft.training.summary import describe_summary


def dry_run(options: Options, environment: Mapping[str, str] | None = None) -> Iterator[str]:
    """Yield the lines to print.

    Args:
        options: of the run.
        environment: what accelerate's launcher sets; the process's own by default.

    Raises:
        ModelError: the model cannot be found or trained.
        PatchError: a patch does not fit the model.
        UsageError: the engine does not fit the options or the model.
        DoesNotFitError: after the last line, if the GPU's memory does not suffice.
    """
    folder = RunFolder(options.output_dir)
    summary = check_start(folder, options)
    yield "options (a recipe that runs again):"
    yield _indent(yaml.safe_dump(options.resolved(), sort_keys=False, allow_unicode=True))
    if summary is not None:
        yield describe_summary(folder, summary)
    model = meta_model(options.model.model_name_or_path, options.model.model_revision)
    decisions = decide(options, model, Machine.here(options.train), environment)
    monkey_patch.apply_patches(model, decisions.patches)  # logs each one
    yield from decisions.lines()
    if decisions.advice_line:
        yield decisions.advice_line
    decisions.plan.check()


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.rstrip().splitlines())

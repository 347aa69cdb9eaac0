"""A folder that holds a finished run: is it the one that is asked for, or one to be continued?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwen3_sft.checkpoints.resume import CHANGEABLE
from qwen3_sft.data.identity import data_fingerprint
from qwen3_sft.errors import UsageError
from qwen3_sft.options.changes import OPTIONS, comparable, in_words, length
from qwen3_sft.options.data_entries import read_entries
from qwen3_sft.options.recipe import Options
from qwen3_sft.records.run_folder import RunFolder

_OTHER = "choose another --output_dir for another run"
_DATASETS = {"dataset": "data_report.json", "eval_dataset": "eval_data_report.json"}


def is_asked_for(folder: RunFolder, summary: dict[str, Any], options: Options) -> bool:
    """Whether a finished run is what these options ask for; False if they ask for more steps.

    Args:
        folder: of the run.
        summary: what it wrote at its end.
        options: as they were given, or as its config.yaml has them.

    Raises:
        UsageError: they ask for another run, naming what differs.
    """
    if "asked" not in summary:
        raise UsageError(
            f"{folder.path} holds a finished run of an earlier version, which does not say what "
            f"was asked of it: {_OTHER}"
        )
    _check_resume_path(folder, options)
    changed = dict(_changed(folder, summary, options))
    longer = _longer(changed, summary, options)
    allowed = {*longer, *options.train.allow_change} if longer else set()
    refused = [words for name, words in changed.items() if name not in allowed]
    if refused:
        more = [n for n in changed if n in CHANGEABLE] if longer else []
        allow = f", or --allow_change {' '.join(more)} to go on with it" if more else ""
        raise UsageError(
            f"{folder.path} holds a finished run of other options: {', '.join(refused)}. Nothing "
            f"was done: {_OTHER}{allow}. More steps (--max_steps, --num_train_epochs) go on from it"
        )
    return not longer


def _check_resume_path(folder: RunFolder, options: Options) -> None:
    resume = options.train.resume
    if resume == "never" or (
        resume != "auto" and folder.path.resolve() not in Path(resume).resolve().parents
    ):
        raise UsageError(
            f"--resume {resume}: {folder.path} holds a finished run; {_OTHER}, or leave it out"
        )


def _changed(
    folder: RunFolder, summary: dict[str, Any], options: Options
) -> Iterator[tuple[str, str]]:
    """Yield the names of options whose value is another one, with both."""
    now = json.loads(json.dumps(comparable(options.values())))
    asked, used = summary["asked"], summary["used"]
    for name, value in now.items():
        if name in OPTIONS["length"] or value in (asked.get(name), used.get(name)):
            continue
        if name in _DATASETS and _same_content(folder, name, options):
            continue
        yield name, in_words(name, asked.get(name), value)
    for name, report in _DATASETS.items():
        if now[name] == asked.get(name) and _same_content(folder, name, options) is False:
            yield "data", f"the files of --{name} are not those of {folder.path / report} any more"
    before, after = length(asked), length(now)
    for name in OPTIONS["length"]:
        if before[name] != after[name]:
            yield name, in_words(name, before[name], after[name])


def _same_content(folder: RunFolder, name: str, options: Options) -> bool | None:
    """Whether the files of a dataset hold what was trained; None where they are not at hand."""
    sources = [e.path for e in read_entries(getattr(options.data, name), f"--{name}")]
    report = _DATASETS[name]
    is_there = (folder.path / report).is_file()
    if not sources or not is_there or not all(Path(source).exists() for source in sources):
        return None
    recorded = folder.read_json(report).get("fingerprints", {})
    return recorded.get("data") == data_fingerprint(options.data, eval=name == "eval_dataset")


def _longer(changed: dict[str, str], summary: dict[str, Any], options: Options) -> tuple[str, ...]:
    """Return the changes that make a run longer, as far as the options tell."""
    before, after = length(summary["asked"]), length(options.values())
    patience, waited = options.train.early_stopping_patience, "early_stopping_patience"
    waits_longer = patience is None or patience > (summary["asked"][waited] or 0)
    if waited in changed and summary["stopped_early"] and waits_longer:
        return (waited, *OPTIONS["length"])
    if not any(name in changed for name in OPTIONS["length"]):
        return ()
    is_known = (before["max_steps"] > 0) == (after["max_steps"] > 0)
    name = "max_steps" if after["max_steps"] > 0 else "num_train_epochs"
    if is_known and after[name] < before[name]:
        return ()
    return OPTIONS["length"]

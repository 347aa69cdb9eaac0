"""What options and folders tell at once, before a model is looked for or data is read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from qwen3_sft.checkpoints.finished import is_asked_for
from qwen3_sft.checkpoints.resume import check_allowed, check_resume
from qwen3_sft.data.readers import check_sources
from qwen3_sft.demo.build import refuse_foreign, uses_demo
from qwen3_sft.export.upload import check_token
from qwen3_sft.options.paths import refuse_unwritable
from qwen3_sft.options.recipe import Options
from qwen3_sft.records.overlap import refuse_run_over_source
from qwen3_sft.records.ownership import refuse_foreign_export, refuse_foreign_run
from qwen3_sft.records.run_folder import RunFolder
from qwen3_sft.training.arguments import check_machine


def check_start(folder: RunFolder, options: Options) -> dict[str, Any] | None:
    """Refuse what need not be begun; return the summary if it is finished already.

    Raises:
        UsageError: the folder is not ours, is read as well, or holds another finished run; an
            option means nothing here.
    """
    is_first = os.environ.get("RANK", "0") == "0"  # it may write by the time others look
    if is_first:
        refuse_run_over_source(options)
        refuse_foreign_run(folder.path)
    check_allowed(options.train.allow_change)
    summary = folder.summary()
    if summary is not None and is_asked_for(folder, summary, options):
        return summary
    if is_first:
        refuse_foreign_export(folder.model)
        if uses_demo(options.model.model_name_or_path, options.data):
            refuse_foreign(folder.demo)
    check_token(options.train)
    check_resume(folder, options.train.resume)
    return None


def check_place(options: Options) -> None:
    """Refuse what this machine lacks: GPUs, datasets, folders to write to.

    Raises:
        UsageError: naming the option.
        DataError: a dataset is not there.
    """
    check_machine(options.train)
    refuse_unwritable(Path(options.output_dir), "--output_dir")
    if options.data.data_cache_dir:
        refuse_unwritable(Path(options.data.data_cache_dir), "--data_cache_dir")
    check_sources(options.data)

"""Options that contradict each other, or do nothing without another: found before anything loads.

What depends on the engine or the machine is checked in `training/arguments.py`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen3_sft.errors import UsageError

if TYPE_CHECKING:
    from qwen3_sft.options.train_args import TrainArguments

_REPO_ID = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")
_PROJECTED = ("galore_", "apollo_")


def check_combinations(given: Any) -> None:
    """Refuse what no run could do, whatever machine, model and data.

    Args:
        given: an object whose attributes are all options.

    Raises:
        UsageError: naming the options.
    """
    if given.eval_fraction and given.eval_dataset:
        raise UsageError("--eval_fraction and --eval_dataset are both set: choose one")
    if given.max_steps < 1 and given.num_train_epochs <= 0:
        raise UsageError(
            f"--num_train_epochs {given.num_train_epochs:g}: nothing would be trained; set it "
            "above 0, or --max_steps"
        )
    if given.fp16 and given.bf16:
        raise UsageError("--fp16 and --bf16 are both set: choose one")
    _check_companions(given)
    _check_hub(given)


def _check_companions(train: TrainArguments) -> None:
    """Refuse options that do nothing, or fail much later, without another."""
    optim = str(getattr(train.optim, "value", train.optim))
    needed = {
        "dataloader_prefetch_factor": ("--dataloader_num_workers", train.dataloader_num_workers),
        "dataloader_multiprocessing_context": (
            "--dataloader_num_workers", train.dataloader_num_workers,
        ),
        "optim_target_modules": ("--optim galore_... or apollo_...", optim.startswith(_PROJECTED)),
        "hub_model_id": ("--push_to_hub true", train.push_to_hub),
        **{
            f"trackio_{name}": ("--report_to trackio", "trackio" in train.report_to)
            for name in ("space_id", "bucket_id", "static_space_id")
        },
    }  # fmt: skip
    for name, (other, is_there) in needed.items():
        if getattr(train, name) is not None and not is_there:
            raise UsageError(f"--{name} {getattr(train, name)}: does nothing without {other}")


def _check_hub(train: TrainArguments) -> None:
    if train.push_to_hub and not _REPO_ID.fullmatch(hub_name(train)):
        raise UsageError(
            f"--hub_model_id {hub_name(train)}: not a name of the hub; set it to NAME or OWNER/NAME"
        )


def hub_name(train: TrainArguments) -> str:
    """Return what the uploaded model is called: by default as the run folder is."""
    return train.hub_model_id or Path(str(train.output_dir)).name


def check_schedule(train: TrainArguments) -> None:
    """Make the schedule once, on one weight, since its arguments are checked nowhere else.

    It takes torch and transformers, and stands apart from `check_combinations` therefore.

    Raises:
        UsageError: naming the options.
    """
    import torch
    from transformers import get_scheduler

    if train.lr_scheduler_kwargs is None and train.lr_scheduler_type in ("linear", "cosine"):
        return
    given = train.lr_scheduler_kwargs or {}
    kwargs = json.loads(given) if isinstance(given, str) else given
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=train.learning_rate)
    try:
        get_scheduler(
            train.lr_scheduler_type, optimizer, num_warmup_steps=1, num_training_steps=100,
            scheduler_specific_kwargs=kwargs,
        )  # fmt: skip
    except (TypeError, ValueError, AssertionError) as error:
        raise UsageError(
            f"--lr_scheduler_type {train.lr_scheduler_type} --lr_scheduler_kwargs "
            f"{json.dumps(kwargs)}: {error}"
        ) from error

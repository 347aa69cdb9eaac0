"""What a run will write to disk, known before data is read: checkpoints and the export."""

from __future__ import annotations

import logging
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from qwen3_sft.checkpoints.folders import checkpoints
from qwen3_sft.errors import UsageError
from qwen3_sft.optimizers.choice import OptimizerChoice
from qwen3_sft.options.recipe import Options
from qwen3_sft.plan.optimizer_states import state_bytes

logger = logging.getLogger(__name__)

_GB = 1e9


@dataclass(frozen=True)
class DiskUse:
    """Bytes of one run.

    Attributes:
        checkpoint: one of them, without what is small.
        most: checkpoints that lie there at once: those that are kept, and the one being written.
        export: the model.
    """

    checkpoint: int
    most: int
    export: int

    @classmethod
    def of(
        cls,
        options: Options,
        model: PreTrainedModel,
        choice: OptimizerChoice,
        weights: torch.dtype,
        *,
        has_masters: bool = False,
    ) -> DiskUse:
        """Count what the options imply.

        Args:
            options: completed.
            model: on the meta device.
            choice: of the optimizer.
            weights: the dtype that trained weights are kept in.
            has_masters: whether float32 weights are saved with the optimizer (DeepSpeed).
        """
        train = options.train
        shapes = [tuple(parameter.shape) for parameter in model.parameters()]
        elements = sum(map(math.prod, shapes))
        kept = torch.float32 if has_masters else weights
        states = 0 if train.save_only_model else state_bytes(shapes, choice, kept)
        saves = train.save_strategy != "no" and train.stop_after_steps is None
        named = options.model.export_dtype
        written: Any = getattr(torch, named) if named != "auto" else model.config.dtype
        return cls(
            checkpoint=elements * kept.itemsize + states if saves else 0,
            most=_most(options),
            export=elements * (written or torch.float32).itemsize
            if train.stop_after_steps is None
            else 0,
        )

    def check(self, folder: Path) -> None:
        """Refuse a disk that cannot hold what is certain to be written; warn of one that may not.

        A run that goes on has its earlier checkpoints there already, and rotates them.

        Args:
            folder: of the run; it need not exist.

        Raises:
            UsageError: with the bytes needed and free.
        """
        there = folder.absolute()
        while not there.exists():
            there = there.parent
        free, old = shutil.disk_usage(there).free, len(checkpoints(folder))
        certain = self.checkpoint if old else self.checkpoint + self.export
        likely = max(1, self.most - old) * self.checkpoint + self.export
        text = (
            f"{folder}: {free / _GB:.2f} GB are free; a checkpoint takes "
            f"{self.checkpoint / _GB:.2f} GB, up to {self.most} lie there at once, and the "
            f"exported model takes {self.export / _GB:.2f} GB"
        )
        remedy = (
            "free some space, choose another --output_dir, or set --save_total_limit 1, "
            "--save_only_model true, or --save_strategy no"
        )
        if free < certain:
            raise UsageError(f"{text}: {remedy}")
        if free < likely:
            logger.warning("%s: that may not be enough; %s", text, remedy)


def _most(options: Options) -> int:
    """Return how many checkpoints there may be; where only the data tells, one more than at least.

    Those of a limit stay until the next one is whole.
    """
    train = options.train
    if train.save_total_limit:
        most = train.save_total_limit + 1
    else:
        most = 2
        if train.save_strategy == "steps" and train.max_steps > 0:
            steps = (
                train.save_steps if train.save_steps >= 1 else train.save_steps * train.max_steps
            )
            most = math.ceil(train.max_steps / max(1, steps))
    return most

"""The worker of tests/distributed/worker.py with faults that cases switch on in their environment.

EDGE_FULL_DISK_AT=S: rank 0's disk is full when the checkpoint of step S is published.
EDGE_SMALL_FILES_AT=S: rank 1's files take 1,000 bytes and no more in the checkpoint of step S.
EDGE_NAN_WEIGHT_AT=S: rank 1's part of a weight turns NaN before the checkpoint of step S.
EDGE_SIGNAL_AT=S: rank 1 gets SIGUSR1 in step S.
EDGE_NAN_GRADIENT_AT=S, EDGE_NAN_LOSS_AT=S: rank 1's backward pass or loss is NaN in step S.
EDGE_WORSE_FROM=S: evaluations from step S on are worse than those before.
{RANK} in an option becomes the rank.

Each rank prints the files of its checkpoints that it has to read for their hash.
"""

from __future__ import annotations

import errno
import math
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from qwen3_sft import run
from qwen3_sft.checkpoints.ledger import Ledger
from qwen3_sft.checkpoints.save import CheckpointSaver
from qwen3_sft.checkpoints.state_tensors import local_part
from qwen3_sft.training.trainer import SftTrainer
from tests.distributed import worker


def main(cases: list[dict[str, Any]], folder: Path) -> int:
    """Install the faults, then run the cases."""
    _break_trainer()
    original = run.run_command
    rank = os.environ.get("RANK", "0")
    run.run_command = lambda argv: original([word.replace("{RANK}", rank) for word in argv])
    return worker.main(cases, folder)


def _is_due(fault: str, step: int, rank: int = 1) -> bool:
    return os.environ.get(fault) == str(step) and os.environ.get("RANK", "0") == str(rank)


def _break_trainer() -> None:
    publish, save = CheckpointSaver._publish, SftTrainer._save_checkpoint
    record = Ledger.record
    compute_loss, evaluate = SftTrainer.compute_loss, SftTrainer.evaluate

    def failing_publish(self: Any, name: str, state: Any, *args: Any) -> None:
        if _is_due("EDGE_FULL_DISK_AT", state.global_step, rank=0):
            raise OSError(errno.ENOSPC, "No space left on device", str(self.folder_now))
        publish(self, name, state, *args)

    def spoiled_save(self: Any, *args: Any) -> None:
        if _is_due("EDGE_NAN_WEIGHT_AT", self.state.global_step):
            with torch.no_grad():
                largest = max(map(local_part, self.model.parameters()), key=torch.numel)
                largest.view(-1)[-1] = math.nan
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if _is_due("EDGE_SMALL_FILES_AT", self.state.global_step):
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            save(self, *args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    def told_record(self: Any, path: Path) -> None:
        sys.stdout.write(f"read again: {self.name(path)}\n")
        sys.stdout.flush()
        record(self, path)

    def spoiled_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = compute_loss(self, *args, **kwargs)
        step = self.state.global_step + 1
        if _is_due("EDGE_SIGNAL_AT", step):
            signal.raise_signal(signal.SIGUSR1)
        if _is_due("EDGE_NAN_GRADIENT_AT", step):
            loss.register_hook(lambda gradient: gradient * math.nan)
        if _is_due("EDGE_NAN_LOSS_AT", step):
            self.step_loss.total += math.nan
            return loss * math.nan
        return loss

    def worse(self: Any, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = evaluate(self, *args, **kwargs)
        if self.state.global_step >= int(os.environ.get("EDGE_WORSE_FROM", sys.maxsize)):
            metrics["eval_loss"] += 100
        return metrics

    Ledger.record = told_record
    CheckpointSaver._publish, SftTrainer._save_checkpoint = failing_publish, spoiled_save
    SftTrainer.compute_loss, SftTrainer.evaluate = spoiled_loss, worse

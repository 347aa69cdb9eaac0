"""What happens at the beginning, the end and each step of training, one small class for each."""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerState

from qwen3_sft.distributed.peer_watch import PeerWatch
from qwen3_sft.model.activation_checkpointing import SeenOperators
from qwen3_sft.packing.isolation import check_isolation
from qwen3_sft.packing.rows import PackedDataset
from qwen3_sft.training.metrics import Metrics

logger = logging.getLogger(__name__)


class EarlyStopping(EarlyStoppingCallback):
    """transformers' own, of whose state only the count of evaluations is the checkpoint's.

    A run that had stopped, and ended before its model was exported, stops again before any step;
    the patience is that of the options (transformers 5.23 trains on, with the checkpoint's).

    Remove when transformers stops a resumed run that had stopped early: both methods
    """

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Take the patience from `--early_stopping_patience`."""
        super().on_train_begin(args, state, control, **kwargs)
        self.early_stopping_patience = args.early_stopping_patience

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Stop what a resume has begun in vain."""
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True


def check_optimizer(model: torch.nn.Module, optimizer: Any) -> None:
    """Raise unless the optimizer holds exactly the parameters that the model trains.

    Sharding replaces parameters, and accelerate carries them over to the optimizer by address: with
    two at one address, as on the meta device, training goes on and is wrong.

    Raises:
        RuntimeError: naming up to five parameters.
    """
    trained = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    missing = [name for key, name in trained.items() if key not in set(held)]
    if missing or len(held) != len(trained):
        raise RuntimeError(
            f"the optimizer holds {len(held)} parameters, the model trains {len(trained)}; not "
            f"among them: {', '.join(missing[:5]) or 'none, but some twice'}. This is a bug of the "
            "sharding set-up: please report it with the run's environment.json"
        )


class StartCallback(TrainerCallback):
    """Prove before any step that it trains the model at hand, and that documents do not mix."""

    def __init__(self, rows: PackedDataset, pad_token_id: int, layout: str) -> None:
        """Remember the data, what fills its rows, and the engine's layout."""
        self.rows, self.pad_token_id, self.layout = rows, pad_token_id, layout

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Check on every rank: where weights are sharded a forward is collective.

        Raises:
            RuntimeError: the optimizer holds other parameters than the model.
            LeakError: documents see each other.
        """
        if self.layout != "zero":  # DeepSpeed's holds flat copies
            check_optimizer(kwargs["model"], kwargs["optimizer"])
        report = check_isolation(
            kwargs["model"], self.rows[0], self.rows.max_length, self.pad_token_id,
            autocast=torch.bfloat16 if args.bf16 else None,
        )  # fmt: skip
        logger.info("%s", report)


class KeptCheck(TrainerCallback):
    """Prove that selective checkpointing keeps attention's result, after layers have run once."""

    def __init__(self, seen: SeenOperators, attention: str) -> None:
        """Remember what the layers tell, and the implementation for the message."""
        self._seen, self._attention = seen, attention

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Judge what the warm-up of the memory has run, if it has.

        Raises:
            ModelError: attention would run twice.
        """
        self._seen.check(self._attention)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Judge the first step; as `on_train_begin`."""
        self._seen.check(self._attention)


class EpochCallback(TrainerCallback):
    """Tell the packing which epoch begins, also on resume in the middle of one."""

    def __init__(self, rows: PackedDataset) -> None:
        """Remember the dataset to tell."""
        self.rows = rows

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Draw the epoch's packing before its first row is read."""
        self.rows.set_epoch(int(state.epoch or 0))


class StopAfter(TrainerCallback):
    """End training some steps after its start, with their record and without a checkpoint."""

    def __init__(self, steps: int) -> None:
        """Remember how many."""
        self.steps, self._last = steps, 0

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Count from the step that the run starts at."""
        self._last = state.global_step + self.steps

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Stop."""
        if state.global_step >= self._last:
            control.should_training_stop = control.should_log = True
            control.should_save = control.should_evaluate = False


class TellStep(TrainerCallback):
    """Tell the watch which step is done."""

    def __init__(self, watch: PeerWatch) -> None:
        """Remember whom to tell."""
        self._watch = watch

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Tell the step of the checkpoint that training goes on from, or 0."""
        self._watch.step(state.global_step)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Tell the step just done."""
        self._watch.step(state.global_step)


class RecordSteps(TrainerCallback):
    """Begin to count when the first step begins: set-up and loading are not training time."""

    def __init__(self, metrics: Metrics) -> None:
        """Remember who counts."""
        self.metrics = metrics

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Count from here."""
        self.metrics.begin(state.global_step)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Record the last step, whose loss the summary tells, and every saved one.

        A record averages since the one before it; with one at each checkpoint, the records of a
        resumed run are those of an uninterrupted one.
        """
        if control.should_save or state.global_step >= state.max_steps:
            control.should_log = True

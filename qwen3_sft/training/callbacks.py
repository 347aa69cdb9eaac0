"""Early stopping that a resume neither forgets nor repeats."""

from __future__ import annotations

from typing import Any

from transformers import EarlyStoppingCallback, TrainerState


class EarlyStopping(EarlyStoppingCallback):
    """transformers' own, of whose state only the count of evaluations is the checkpoint's.

    A run that had stopped, and ended before its model was exported, stops again before any step;
    the patience is that of the options (transformers 5.23 trains on, with the checkpoint's).
    """

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Take the patience from `--early_stopping_patience`."""
        super().on_train_begin(args, state, control, **kwargs)
        self.early_stopping_patience = args.early_stopping_patience

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Stop what a resume has begun in vain."""
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True

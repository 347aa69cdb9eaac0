"""From when, and at which steps, a run is measured."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerState

from qwen3_sft.training.metrics import Window


class RecordSteps(TrainerCallback):
    """Begin to count when the first step begins: set-up and loading are not training time."""

    def __init__(self, trainer: Any) -> None:
        """Remember the SftTrainer, which keeps the counts."""
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Count from here."""
        self.trainer.window = Window()
        self.trainer.steps_at_last_record = state.global_step

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Record the last step, whose loss the summary tells, and every saved one.

        A record averages since the one before it; with one at each checkpoint, the records of a
        resumed run are those of an uninterrupted one.
        """
        if control.should_save or state.global_step >= state.max_steps:
            control.should_log = True

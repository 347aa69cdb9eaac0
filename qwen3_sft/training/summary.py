"""What a finished run says of itself, in summary.json and on the screen."""

from __future__ import annotations

from typing import Any

from qwen3_sft.records.run_folder import RunFolder
from qwen3_sft.training.completions import before_and_after
from qwen3_sft.training.trainer import SftTrainer


def write_summary(trainer: SftTrainer, folder: RunFolder, options: dict[str, Any]) -> str:
    """Mark the run as finished; return what happened, in words. On rank 0.

    Args:
        trainer: has trained.
        folder: of the run; its model is exported.
        options: `comparable` ones as they were `asked` for and as they were `used`.
    """
    # None where early stopping came before the first record.
    state = trainer.state
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry] or [None]
    evaluations = [entry for entry in state.log_history if "eval_loss" in entry]
    summary = {
        "finished": True,
        "steps": state.global_step,
        "stopped_early": state.global_step < state.max_steps,
        "first_loss": losses[0],
        "loss": losses[-1],
        "best_metric": state.best_metric,
        "evaluation": evaluations[-1] if evaluations else None,
        "skipped_steps": trainer.metrics.totals.skipped_steps,
        "tokens_seen": trainer.metrics.totals.tokens_seen,
        "model": str(folder.model),
        **options,
    }
    folder.write_json("summary.json", summary)
    change = f"loss {_in_words(losses[0])} -> {_in_words(losses[-1])}"
    return (
        f"done: {change} in {_steps(summary)}, model in {folder.model}\n"
        f"{before_and_after(folder.samples)}"
    )


def describe_summary(folder: RunFolder, summary: dict[str, Any]) -> str:
    """Return what a second start says of a finished run."""
    return (
        f"{folder.path} holds a finished run: {_steps(summary)}, "
        f"final loss {_in_words(summary['loss'])}, model in {folder.model}\n"
        f"{before_and_after(folder.samples)}\n"
        "Nothing was changed. To train on raise --max_steps or --num_train_epochs; to train anew "
        "choose another --output_dir, or remove the folder."
    )


def _steps(summary: dict[str, Any]) -> str:
    early = ", stopped early: evaluations did not improve" if summary.get("stopped_early") else ""
    return f"{summary['steps']} steps{early}"


def _in_words(loss: float | None) -> str:
    return "not logged" if loss is None else f"{loss:.4f}"

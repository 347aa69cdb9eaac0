"""What transformers itself refuses, asked before data is read: it would say so hours later.

`TrainingArguments` and the Trainer look at their arguments when they are built, which is after the
tokenising, because building them joins the process group. Each check has a sentence of ours where
one says more; upstream's own code then judges the rest.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer
from transformers.integrations import integration_utils
from transformers.training_args import OptimizerNames

from qwen3_sft.errors import UsageError
from qwen3_sft.optimizers.choice import OptimizerChoice, with_states
from qwen3_sft.options.draft import TrainDraft

# Reporters -> transformers' function that looks for them, and what to install.
_REPORTERS = {
    "azure_ml": ("is_azureml_available", "azureml-sdk"),
    "clearml": ("is_clearml_available", "clearml"),
    "codecarbon": ("is_codecarbon_available", "codecarbon"),
    "comet_ml": ("is_comet_available", "comet-ml"),
    "dagshub": ("is_dagshub_available", "dagshub"),
    "dvclive": ("is_dvclive_available", "dvclive"),
    "flyte": ("is_flytekit_available", "flytekit"),
    "kubeflow": ("is_kubeflow_available", "kubeflow"),
    "mlflow": ("is_mlflow_available", "mlflow"),
    "neptune": ("is_neptune_available", "neptune"),
    "swanlab": ("is_swanlab_available", "swanlab"),
    "tensorboard": ("is_tensorboard_available", "tensorboard"),
    "trackio": ("is_trackio_available", "trackio"),
    "wandb": ("is_wandb_available", "wandb"),
}
# A count, a rate, a switch and a dtype are never written so.
_ODD = "3.25"
_FOLLOWS_EVALUATION = ("reduce_lr_on_plateau", "greedy")


def check_reporters(train: TrainDraft) -> None:
    """Refuse a reporter whose package is not installed.

    Raises:
        UsageError: naming what to install.
    """
    for reporter in train.report_to:
        if reporter not in _REPORTERS:
            continue  # `none` and `all`, which takes those that are there
        is_available, package = _REPORTERS[reporter]
        if not getattr(integration_utils, is_available)():
            remedy = f"pip install {package}"
            if reporter == "kubeflow":
                remedy = "the variable KUBEFLOW_TRAINER_SERVER_URL is not set"
            raise UsageError(f"--report_to {reporter}: not installed; {remedy}")


def check_arguments(train: TrainDraft, *, has_evaluation: bool) -> None:
    """Refuse strategies that contradict each other, and whatever else TrainingArguments refuses.

    Args:
        train: completed.
        has_evaluation: whether there is data to evaluate on.

    Raises:
        UsageError: naming the options.
    """
    evaluation, saves = str(train.eval_strategy), str(train.save_strategy)
    schedule = _word(train.lr_scheduler_type)
    if evaluation == "no" and (schedule in _FOLLOWS_EVALUATION or train.eval_on_start):
        option = (
            "--eval_on_start true" if train.eval_on_start else f"--lr_scheduler_type {schedule}"
        )
        raise UsageError(
            f"{option} needs evaluations: set --eval_fraction or --eval_dataset, and leave "
            "--eval_strategy out"
        )
    if saves == "best" and evaluation == "no":
        raise UsageError(
            "--save_strategy best needs evaluations: set --eval_fraction or --eval_dataset, and "
            "--eval_strategy steps or epoch"
        )
    if train.load_best_model_at_end and saves != "best":
        _check_best(train, evaluation, saves, has_evaluation=has_evaluation)
    # Upstream fills these two in first; whether a GPU computes in bf16 is `check_machine`'s affair.
    asked = replace(train, eval_steps=train.eval_steps or train.logging_steps, bf16=False)
    try:
        asked._validate_args()
    except ValueError as error:
        raise UsageError(str(error)) from error


def _word(value: object) -> str:
    """Return the value of an option that is an enum by default and a word if it was given."""
    return str(getattr(value, "value", value))


def _check_best(train: TrainDraft, evaluation: str, saves: str, *, has_evaluation: bool) -> None:
    """Refuse to go back to a checkpoint that was not evaluated, or an evaluation without one."""
    steps = (train.eval_steps or train.logging_steps, train.save_steps)
    is_apart = evaluation == "steps" and _is_no_multiple(*steps)
    if evaluation == saves != "no" and not is_apart:
        return
    found = f"--eval_strategy {evaluation} and --save_strategy {saves}"
    if evaluation == saves == "steps":
        found = f"--eval_steps {steps[0]:g} and --save_steps {steps[1]:g}"
    if not has_evaluation:
        found = "neither --eval_fraction nor --eval_dataset"
    raise UsageError(
        f"--load_best_model_at_end true: every checkpoint must have been evaluated, and there is "
        f"{found}; set the strategies alike, and --save_steps to a multiple of --eval_steps"
    )


def _is_no_multiple(evaluation: float, save: float) -> bool:
    if (evaluation < 1) != (save < 1):
        return True
    million = 1_000_000  # shares of all steps are compared as upstream does
    return round(save * million) % round(evaluation * million) != 0


def check_optimizer(train: TrainDraft, choice: OptimizerChoice, model: PreTrainedModel) -> None:
    """Build the optimizer once, of one weight, since nothing else looks at its arguments.

    Args:
        train: completed.
        choice: of the optimizer.
        model: on the meta device.

    Raises:
        UsageError: a package is missing, or an argument is unknown, wrong or read by nobody.
    """
    asked = replace(train, optim=OptimizerNames(choice.optim))
    try:
        kind, kwargs = with_states(choice, Trainer.get_optimizer_cls_and_kwargs(asked, model))
        # Others than these take the whole model.
        if isinstance(kind, type) and not kwargs.keys() & {"params", "model", "optimizer_dict"}:
            kind([torch.zeros(1, requires_grad=True)], **kwargs)
    except (ValueError, TypeError, ImportError, RuntimeError, NotImplementedError) as error:
        given = f" --optim_args {train.optim_args}" if train.optim_args else ""
        raise UsageError(f"--optim {choice.optim}{given}: {error}") from error
    _check_read(asked, choice, model)


def _check_read(asked: TrainDraft, choice: OptimizerChoice, model: PreTrainedModel) -> None:
    """Refuse pairs of --optim_args that nothing reads.

    transformers has no list of them: a name is read if an odd value of it is noticed.
    """

    def chosen(optim_args: str | None) -> Any:
        draft = replace(asked, optim_args=optim_args)
        return _without_tensors(Trainer.get_optimizer_cls_and_kwargs(draft, model)[1])

    plain = chosen(None)
    for name in choice.given.keys() - choice.own_arguments:
        try:
            is_read = chosen(f"{name}={_ODD}") != plain
        except (ValueError, TypeError, AttributeError, RuntimeError):
            is_read = True  # and found wrong
        if not is_read:
            raise UsageError(
                f"--optim_args {name}={choice.given[name]}: --optim {choice.optim} does not read "
                f"{name}; leave it out. Rates, betas, epsilon and weight decay have options"
            )


def _without_tensors(value: Any) -> Any:
    """Return arguments that can be compared: tensors by identity."""
    if isinstance(value, torch.Tensor):
        return id(value)
    if isinstance(value, dict):
        return {key: _without_tensors(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_tensors(entry) for entry in value]
    return value

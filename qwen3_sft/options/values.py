"""Which values an option takes, known before anything is loaded.

Types and listed choices are argparse's affair; these are the values that it would let through.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qwen3_sft.errors import UsageError
from qwen3_sft.options.judged_options import refuse

REPORTERS = (
    "none", "all", "azure_ml", "clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "flyte",
    "kubeflow", "mlflow", "neptune", "swanlab", "tensorboard", "trackio", "wandb",
)  # fmt: skip
SCHEDULES = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
    "inverse_sqrt", "reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr",
    "warmup_stable_decay", "greedy",
)  # fmt: skip
METRICS = ("loss", "eval_loss")


@dataclass(frozen=True)
class Rule:
    """What a value has to be.

    Attributes:
        words: end the sentence "must be ...".
        holds: whether a value is so; None, where an option has it, is not asked about.
        wrong: some values that are not, for the tests.
        names: the only values there are; empty where there are others.
    """

    words: str
    holds: Callable[[Any], bool]
    wrong: tuple[str, ...]
    names: tuple[str, ...] = ()


def _at_least(low: float) -> Rule:
    below = f"{low - 1:g}"
    wrong = (below,) if isinstance(low, int) else (below, "nan", "inf")
    return Rule(f"at least {low:g}", lambda value: low <= value < math.inf, wrong)


def _one_of(*names: str) -> Rule:
    return Rule(
        f"one of {', '.join(names)}", lambda value: value in names, ("cosin", "accuracy"), names
    )


def _is_steps(value: float) -> bool:
    return 0 < value < 1 or (1 <= value < math.inf and value == int(value))


def _is_warm_up(value: float) -> bool:
    return value == 0 or _is_steps(value)


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except json.JSONDecodeError:
        return False


def _is_pair(text: str) -> bool:
    name, _, value = text.partition("=")
    return bool(name and value)


def _are_pairs(text: str) -> bool:
    return all(part.count("=") == 1 and part[0] != "=" for part in text.split(","))


_COUNT, _RATE = _at_least(1), _at_least(0.0)
_STEPS = Rule("whole steps, or a share of all below 1", _is_steps, ("0", "-2", "1.5", "nan", "inf"))
_BETA = Rule("0 or more and below 1", lambda value: 0 <= value < 1, ("2", "1", "-0.1", "nan"))
_SHARE = Rule("0 to 1", lambda value: 0 <= value <= 1, ("1.5", "-0.1", "nan"))
_ALL_OR_COUNT = Rule("-1 or at least 1", lambda value: value == -1 or value >= 1, ("0", "-2"))

RULES: dict[str, Rule] = {
    # ---- model ----
    "fsdp_size": _ALL_OR_COUNT, "ep_size": _COUNT, "dp_replicate_size": _COUNT,
    # ---- data ----
    "columns": Rule("KNOWN=NAME, such as prompt=question", _is_pair, ("prompt", "=a", "a=")),
    "max_rows": _COUNT, "num_proc": _COUNT, "max_length": _at_least(8), "max_drop_fraction": _SHARE,
    "eval_fraction": Rule("0 to 0.5", lambda value: 0 <= value <= 0.5, ("0.6", "-0.1", "nan")),
    # ---- steps ----
    "per_device_train_batch_size": _COUNT, "per_device_eval_batch_size": _COUNT,
    "gradient_accumulation_steps": _COUNT, "global_batch_size": _COUNT,
    "num_train_epochs": Rule("a number", math.isfinite, ("nan", "inf")),
    "max_steps": Rule("-1 (as num_train_epochs says) or at least 1",
                      lambda value: value == -1 or value >= 1, ("0", "-2")),
    "stop_after_steps": _COUNT, "max_bad_steps": _COUNT, "early_stopping_patience": _COUNT,
    "logging_steps": _STEPS, "eval_steps": _STEPS, "save_steps": _STEPS, "eval_delay": _RATE,
    "warmup_steps": Rule("0, whole steps, or a share of all below 1",
                         _is_warm_up, ("-1", "1.5", "nan")),
    "save_total_limit": _at_least(0), "torch_empty_cache_steps": _COUNT,
    # ---- rates ----
    "learning_rate": _RATE, "weight_decay": _RATE, "adam_beta1": _BETA, "adam_beta2": _BETA,
    "adam_epsilon": _RATE, "max_grad_norm": _RATE, "neftune_noise_alpha": _RATE,
    "router_aux_loss_coef": _RATE,
    "lr_scheduler_type": _one_of(*SCHEDULES), "metric_for_best_model": _one_of(*METRICS),
    "report_to": _one_of(*REPORTERS),
    "lr_scheduler_kwargs": Rule("a JSON object such as {\"num_cycles\": 2}", _is_object,
                                ("num_cycles=2", "[2]", "{", "2")),
    "optim_args": Rule("name=value, separated by commas", _are_pairs, ("rank", "a=1,,b=2", "=1")),
    # ---- others ----
    "seed": Rule("0 to 4294967295", lambda value: 0 <= value < 2**32, ("-1", "4294967296")),
    "num_samples": _at_least(0), "sample_max_new_tokens": _COUNT, "dist_timeout_s": _COUNT,
    "dataloader_num_workers": _at_least(0), "dataloader_prefetch_factor": _COUNT,
    "ddp_bucket_cap_mb": _COUNT,
}  # fmt: skip
# --optim -> the package that has it; what is not listed comes with torch or transformers.
_BNB = (
    "adamw_bnb_8bit", "adamw_8bit", "ademamix", "ademamix_8bit", "lion_8bit", "lion_32bit",
    "paged_adamw_32bit", "paged_adamw_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit",
    "paged_lion_32bit", "paged_lion_8bit", "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit",
)  # fmt: skip
_BY_PREFIX = {
    "galore_": "galore_torch", "apollo_": "apollo_torch", "schedule_free_": "schedulefree",
    "lomo": "lomo_optim", "adalomo": "lomo_optim", "grokadamw": "grokadamw",
    "stable_adamw": "optimi", "adamw_anyprecision": "torchdistx", "adamw_torch_xla": "torch_xla",
    "adamw_torch_npu_fused": "torch_npu", "adamw_torch_4bit": "torchao",
    "adamw_torch_8bit": "torchao",
}  # fmt: skip
# Reporters name files after them.
_NAMES = ("run_name", "project")
_TOO_LARGE = 2**32  # what counts in 64 bits multiplies two of them
# Whose default is empty; without a model a run is refused with a sentence of its own.
_EMPTY = ("model_name_or_path", "debug")


def check_value(name: str, value: Any) -> None:
    """Refuse a value that no run could use.

    Args:
        name: of an option.
        value: as argparse has read it.

    Raises:
        UsageError: naming the option, its value and what it must be.
    """
    if value is None or (value == "" and name in _EMPTY):
        return
    words = value if isinstance(value, list) else [value]
    if any(isinstance(word, str) and not word.strip() for word in words):
        raise UsageError(f"--{name}: an empty value; leave the option out for its default")
    refuse(name, value)
    rule = RULES.get(name)
    for word in words:
        if type(word) is int and abs(word) >= _TOO_LARGE:
            raise UsageError(f"--{name} {word}: too large; nothing here has so many")
        if rule is not None and not rule.holds(word):
            raise UsageError(f"--{name} {word}: must be {rule.words}")
    if name in _NAMES:
        _check_name(name, str(value))


def package_of_optimizer(name: str) -> str | None:
    """Return the module that has to be installed for a value of --optim, if there is one."""
    if name in _BNB:
        return "bitsandbytes"
    return next((module for start, module in _BY_PREFIX.items() if name.startswith(start)), None)


def _check_name(name: str, value: str) -> None:
    if set(value) & {"/", "\\", "\0"} or value.startswith("."):
        raise UsageError(
            f"--{name} {value}: a name, not a path, since reporters name files after it; "
            "leave out / and \\ and a leading dot"
        )

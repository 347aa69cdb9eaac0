"""Every option, judged: what a new value of it means for a run that goes on, or is finished.

A test compares the names with the options, so that a new one has to be judged before CI passes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from qwen3_sft.records.secret_options import is_secret

Meaning = Literal[
    "data", "schedule", "length", "update", "fixed", "computed", "result", "free"
]  # fmt: skip

OPTIONS: dict[Meaning, tuple[str, ...]] = {
    # Which tokens a step trains. Checkpoints hold hashes of what these name.
    "data": (
        "dataset", "dataset_format", "dataset_split", "dataset_config", "dataset_revision",
        "streaming", "max_rows", "columns", "ignore_columns", "on_bad_row", "txt_rows", "overlong",
        "train_on", "thinking", "train_empty_think",
        "chat_format", "max_length", "packing", "eval_fraction", "seed", "global_batch_size",
        "per_device_train_batch_size", "gradient_accumulation_steps",
    ),
    # The learning rate of a step, which follows from the number of the step alone.
    "schedule": ("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    "length": ("max_steps", "num_train_epochs"),
    # What an update does besides; a new value counts for the updates to come.
    "update": (
        "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "clip",
        "router_aux_loss_coef", "neftune_noise_alpha",
    ),
    # What a checkpoint's weights and optimizer states are made of.
    "fixed": (
        "model_name_or_path", "model_revision", "dtype", "optim", "optim_args",
        "optim_target_modules", "optimizer_in_backward",
    ),
    # How it is computed: another rounding, at most another precision.
    "computed": (
        "bf16", "fp16", "tf32", "deterministic", "experts_implementation",
        "attn_implementation", "use_liger", "torch_compile", "fp8", "fp8_keep", "fp8_recipe",
        "fp8_scaling",
    ),
    # What is measured on the way, and what becomes of the trained weights.
    "result": (
        "export_dtype", "export_layout", "eval_dataset", "eval_strategy", "eval_steps",
        "eval_delay", "eval_on_start", "load_best_model_at_end", "metric_for_best_model",
        "early_stopping_patience", "push_to_hub", "hub_model_id", "hub_private_repo",
    ),
    "free": (
        "output_dir", "resume", "allow_change", "trust_checkpoint", "ignore_data_skip",
        "restore_callback_states_from_checkpoint", "stop_after_steps", "dry_run", "hub_token",
        "max_bad_steps", "max_drop_fraction", "num_proc", "data_cache_dir",
        "per_device_eval_batch_size", "num_samples", "sample_max_new_tokens",
        "activation_checkpointing", "activation_offload", "memory_warm_up",
        "torch_empty_cache_steps", "use_cpu", "fsdp_size", "ep_size", "dp_replicate_size",
        "dist_timeout_s", "ddp_find_unused_parameters", "ddp_bucket_cap_mb",
        "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend", "dataloader_num_workers",
        "dataloader_pin_memory", "dataloader_prefetch_factor",
        "dataloader_multiprocessing_context", "logging_strategy", "logging_steps",
        "logging_first_step", "log_on_each_node", "log_level", "log_level_replica", "report_to",
        "run_name", "project", "trackio_space_id", "trackio_bucket_id",
        "trackio_static_space_id", "save_only_model", "save_strategy", "save_steps",
        "save_total_limit",
    ),
}  # fmt: skip


def comparable(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that decide what a run leaves behind, as JSON keeps them.

    Args:
        values: of all options (`Options.values`).
    """
    free = OPTIONS["free"]
    judged = [name for names in OPTIONS.values() for name in names if name not in free]
    return {name: _plain(values[name]) for name in judged if not is_secret(name)}


def length(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what says how long a run is: steps, which win if they are given, or epochs."""
    has_steps = values["max_steps"] > 0
    return {
        "max_steps": values["max_steps"] if has_steps else -1,
        "num_train_epochs": None if has_steps else values["num_train_epochs"],
    }


def in_words(name: str, before: Any, after: Any) -> str:
    """Return `name before -> after`."""
    return f"{name} {before} -> {after}"


def _plain(value: Any) -> Any:
    value = getattr(value, "value", value)  # of an enum
    if isinstance(value, tuple | list):
        return [_plain(entry) for entry in value]
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    return value

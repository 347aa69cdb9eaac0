"""Every option of transformers' TrainingArguments, judged: does it do here what it says?

A test compares the names with the dataclass, so that an option of a new version of transformers
has to be judged before CI passes. The notes say what upstream's code writes, sends or deletes
beside our own writers, and why the others are harmless.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from qwen3_sft.errors import UsageError

_OFF: tuple[object, ...] = (False, None, "", 0, 0.0)


@dataclass(frozen=True)
class Judged:
    """What becomes of an option.

    Attributes:
        verdict: `works`, passed on to transformers; `ours`, done by this project; `refused`.
        note: of a refused option what to set instead; else its effects, if it has any outside.
        fine: values of a refused option that ask for nothing.
    """

    verdict: Literal["works", "ours", "refused"]
    note: str = ""
    fine: tuple[object, ...] = ()


def _no(note: str, *fine: object) -> Judged:
    return Judged("refused", note, fine or _OFF)


def _ours(note: str = "") -> Judged:
    return Judged("ours", note)


def _works(note: str = "") -> Judged:
    return Judged("works", note)


_EVALUATION = "evaluation is the exact loss per label, and nothing else; leave it out"
_REPORTER = "only with --report_to trackio, which then sends the metrics to the hub"

JUDGED: dict[str, Judged] = {
    # ---- steps, rates, optimizer ----
    "output_dir": _ours("all that is written lies below it; token caches do not"),
    "per_device_train_batch_size": _works(), "num_train_epochs": _works(), "max_steps": _works(),
    "learning_rate": _works(), "lr_scheduler_type": _works(), "lr_scheduler_kwargs": _works(),
    "warmup_steps": _works(), "optim": _ours("optimizers/choice.py"),
    "optim_args": _ours("optimizers/choice.py"), "weight_decay": _works(), "adam_beta1": _works(),
    "adam_beta2": _works(), "adam_epsilon": _works(),
    "optim_target_modules": _works("GaLore and APOLLO only"),
    "gradient_accumulation_steps": _works(),
    "average_tokens_across_devices": _no("the loss is per label of the whole step; leave it on",
                                         True),
    "max_grad_norm": _works(),
    "label_smoothing_factor": _no("would need the full logits; not supported"),
    # ---- precision, memory, speed ----
    "bf16": _works(), "fp16": _works(),
    "bf16_full_eval": _no("evaluation computes as training does; leave it out"),
    "fp16_full_eval": _no("evaluation computes as training does; leave it out"),
    "tf32": _works("sets torch's switches for the process"),
    "activation_checkpointing": _ours("model/activation_checkpointing.py"),
    "activation_checkpointing_kwargs": _no("see --activation_checkpointing and _offload"),
    "gradient_checkpointing": _no("set --activation_checkpointing full or selective instead"),
    "gradient_checkpointing_kwargs": _no("set --activation_checkpointing instead"),
    "torch_compile": _ours("model/layer_compile.py; upstream would set ACCELERATE_DYNAMO_*"),
    "torch_compile_backend": _no("layers are compiled by inductor; leave it out"),
    "torch_compile_mode": _no("not supported; leave it out"),
    "use_liger_kernel": _no("Liger is applied while loading; set --use_liger instead"),
    "liger_kernel_config": _no("Liger is applied while loading; set --use_liger instead"),
    "use_cache": _no("packed documents would see each other; leave it off"),
    "neftune_noise_alpha": _works("its noise is scaled by the packed row, not by the document"),
    "torch_empty_cache_steps": _works("empties the CUDA allocator's cache, slow"),
    "auto_find_batch_size": _no("a row is max_length tokens; lower --max_length instead"),
    # ---- logs and reporters ----
    "logging_strategy": _works(), "logging_steps": _works(), "logging_first_step": _works(),
    "log_on_each_node": _works(),
    "logging_nan_inf_filter": _no("would hide non-finite losses; leave it off", False),
    "include_num_input_tokens_seen": _no("metrics.jsonl has tokens_seen; leave it out", False,
                                         "no"),
    "log_level": _works(), "log_level_replica": _works(),
    "disable_tqdm": _no("there is a line per step and no bar; leave it out", None, True),
    "report_to": _works("reporters send or write: wandb, mlflow and others to their servers and "
                        "folders below the working directory, tensorboard to output_dir/runs or "
                        "TENSORBOARD_LOGGING_DIR; their failures end no run"),
    "run_name": _works("reporters name files after it: no path"),
    "project": _works("reporters name files after it: no path"),
    "trackio_space_id": _works(_REPORTER), "trackio_bucket_id": _works(_REPORTER),
    "trackio_static_space_id": _works(_REPORTER),
    # ---- evaluation ----
    "eval_strategy": _works(), "eval_steps": _works(), "eval_delay": _works(),
    "per_device_eval_batch_size": _works(), "eval_on_start": _works(),
    "prediction_loss_only": _no(_EVALUATION),
    "eval_do_concat_batches": _no(_EVALUATION, True), "eval_use_gather_object": _no(_EVALUATION),
    "eval_accumulation_steps": _no(_EVALUATION), "include_for_metrics": _no(_EVALUATION, []),
    "batch_eval_metrics": _no(_EVALUATION), "label_names": _no(_EVALUATION),
    # ---- checkpoints ----
    "save_only_model": _ours("checkpoints/save.py"), "save_strategy": _works(),
    "save_steps": _works(),
    "save_on_each_node": _no("checkpoints lie in one folder that all nodes see; leave it off"),
    "save_total_limit": _ours("checkpoints/rotation.py deletes; upstream's rotation never runs"),
    "enable_jit_checkpoint": _no("not exact with dropout; not supported"),
    "load_best_model_at_end": _ours("checkpoints/restore.py"),
    "metric_for_best_model": _works("eval_loss, the only one there is"),
    "greater_is_better": _no("the metric is a loss, the smaller the better; leave it out", None,
                             False),
    "ignore_data_skip": _works(), "restore_callback_states_from_checkpoint": _works(),
    "resume_from_checkpoint": _no("set --resume PATH instead"),
    # ---- the hub: export/upload.py; upstream would send the run folder, its own switch is off ----
    "push_to_hub": _ours("sends the verified export, once, after training"),
    "hub_token": _ours("of the upload; in no file and no log"),
    "hub_private_repo": _ours("of the upload, private unless false; of trackio's Space"),
    "hub_model_id": _ours("of the upload; by default the name of output_dir"),
    "hub_strategy": _no("the verified export is sent once, at the end; leave it out", "every_save",
                        "end"),
    "hub_always_push": _no("the verified export is sent once, at the end; leave it out"),
    "hub_revision": _no("the export goes to the main branch; leave it out"),
    # ---- seeds, devices, data ----
    "full_determinism": _no("set --deterministic true, which does not block after every kernel"),
    "seed": _works(), "data_seed": _no("rows are dealt out by --seed; leave it out"),
    "use_cpu": _works(),
    "accelerator_config": _no("batches are dealt out here; leave it out",
                              '{"non_blocking": true}'),  # as config.yaml has it
    "parallelism_config": _no("set --fsdp_size, --ep_size and --dp_replicate_size instead"),
    "dataloader_drop_last": _no("the packing already fills the last step; leave it off"),
    "dataloader_num_workers": _works("processes"), "dataloader_pin_memory": _works(),
    "dataloader_persistent_workers": _no("workers must see each epoch's packing; leave it off"),
    "dataloader_prefetch_factor": _works(), "dataloader_multiprocessing_context": _works(),
    "dataloader_in_order": _no("a resume goes on where the rows' order says; leave it on", True),
    "remove_unused_columns": _no("the model needs every field of the batch; leave it off", False),
    "train_sampling_strategy": _no("packing balances the rows; leave it at random", "random"),
    "length_column_name": _no("packing balances the rows; leave it out", "length"),
    # ---- several processes ----
    "ddp_find_unused_parameters": _works(), "ddp_bucket_cap_mb": _works(),
    "ddp_broadcast_buffers": _works(), "ddp_static_graph": _works(), "ddp_backend": _works(),
    "ddp_timeout": _no("set --dist_timeout_s instead", 1800),
    "fsdp": _no("launch with --config_file config/fsdp.json instead", "", None, False, []),
    "fsdp_config": _no("launch with --config_file config/fsdp.json instead"),
    "deepspeed": _no(
        "launch with --config_file config/zero3.json or config/zero2.json instead"
    ),
    "local_rank": _no("the launcher says it in the environment; leave it out", -1),
    # ---- others ----
    "debug": _no("steps with NaN or Inf are skipped and counted (--max_bad_steps); leave it out",
                 "", []),
    "skip_memory_metrics": _no("metrics.jsonl has the peak of memory; leave it on", True),
    "do_train": _no("training is what the command does; leave it out"),
    "do_eval": _no("set --eval_fraction or --eval_dataset instead"),
    "do_predict": _no("only training is done here; leave it out"),
}  # fmt: skip
REFUSED = {name: judged for name, judged in JUDGED.items() if judged.verdict == "refused"}


def refuse(name: str, value: Any) -> None:
    """Refuse a value of an option that would do nothing here, or not what it says.

    Raises:
        UsageError: naming the option and what to set instead.
    """
    judged = REFUSED.get(name)
    if judged is not None and value not in judged.fine:
        raise UsageError(f"--{name} {value}: {judged.note}")

"""What other trainers call an option, and what to say of a name that is none of ours.

Names are those of TRL, axolotl, LLaMA-Factory, unsloth and older versions of transformers.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection

_NO_LORA = "LoRA is not supported: all weights are trained; leave it out"
_NO_QUANT = "the weights are not quantised; what saves memory here is --optim adamw_torch_8bit"
_FULL = "all weights are trained, there are no adapters and no stages; leave it out"
_ADAPTER = (
    "use_peft", "use_lora", "use_dora", "use_rslora", "lora", "adapter", "peft_config",
    "lora_model_dir", "lora_r", "lora_rank", "lora_alpha", "lora_dropout", "lora_target",
    "lora_target_modules", "lora_target_linear", "lora_modules_to_save", "lora_task_type", "r",
    "lora_bias", "target_modules", "modules_to_save", "rank", "adapter_name_or_path",
    "loraplus_lr_ratio", "merge_lora",
)  # fmt: skip
_QUANTISED = (
    "load_in_4bit", "load_in_8bit", "quantization_bit", "quantization_method", "qlora",
    "bnb_4bit_quant_type", "bnb_4bit_compute_dtype", "use_bnb_nested_quant", "quantization",
)  # fmt: skip
_OTHER_TASKS = ("rl", "beta", "pref_beta", "pref_loss", "reward_model", "loss_type", "rlhf_type")

# Name elsewhere -> the option here that does the same.
SAME = {
    "batch_size": "per_device_train_batch_size", "micro_batch_size": "per_device_train_batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "epochs": "num_train_epochs", "num_epochs": "num_train_epochs", "lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type", "scheduler": "lr_scheduler_type",
    "max_seq_length": "max_length", "max_seq_len": "max_length", "seq_length": "max_length",
    "sequence_len": "max_length", "cutoff_len": "max_length", "model_max_length": "max_length",
    "block_size": "max_length", "sample_packing": "packing", "model": "model_name_or_path",
    "model_path": "model_name_or_path", "model_name": "model_name_or_path",
    "model_id": "model_name_or_path", "base_model": "model_name_or_path",
    "pretrained_model_name_or_path": "model_name_or_path", "data": "dataset",
    "data_path": "dataset", "dataset_name": "dataset", "train_file": "dataset",
    "dataset_dir": "dataset", "dataset_path": "dataset", "datasets": "dataset",
    "test_datasets": "eval_dataset", "validation_file": "eval_dataset",
    "val_set_size": "eval_fraction", "val_size": "eval_fraction", "output": "output_dir",
    "dataset_prepared_path": "data_cache_dir", "cache_dir": "data_cache_dir",
    "max_samples": "max_rows", "max_train_samples": "max_rows", "torch_dtype": "dtype",
    "dataset_num_proc": "num_proc", "preprocessing_num_workers": "num_proc",
    "dataset_processes": "num_proc", "optimizer": "optim", "evaluation_strategy": "eval_strategy",
    "evals_per_epoch": "eval_steps", "saves_per_epoch": "save_steps", "seed_value": "seed",
    "auto_resume_from_checkpoints": "resume", "overwrite_output_dir": "resume never",
    "wandb_project": "project", "wandb_run_name": "run_name", "wandb_name": "run_name",
    "no_cuda": "use_cpu", "half": "bf16", "revision_of_model": "model_revision",
    "expert_parallel_size": "ep_size", "expert_model_parallel_size": "ep_size",
    "moe_aux_loss_coeff": "router_aux_loss_coef", "aux_loss_coef": "router_aux_loss_coef",
    "early_stopping_steps": "early_stopping_patience", "grad_clip": "max_grad_norm",
    "max_norm": "max_grad_norm", "recompute_granularity": "activation_checkpointing",
    "activation_offloading": "activation_offload", "compile": "torch_compile",
    "enable_thinking": "thinking", "train_on_eos": "train_on", "mask_history": "train_on",
}  # fmt: skip
# Name elsewhere -> a sentence, where no option here is just that.
TOLD = {
    **dict.fromkeys(_ADAPTER, _NO_LORA),
    **dict.fromkeys(_QUANTISED, _NO_QUANT),
    **dict.fromkeys(_OTHER_TASKS, "only supervised fine-tuning is done here; leave it out"),
    "stage": _FULL, "finetuning_type": _FULL, "freeze_trainable_layers": _FULL,
    "use_unsloth": "the kernels here are those of --experts_implementation; leave it out",
    "use_unsloth_gc": "set --activation_checkpointing full and --activation_offload true instead",
    "use_gradient_checkpointing": "set --activation_checkpointing full or selective instead",
    "flash_attn": "set --attn_implementation, or leave it at auto",
    "flash_attention": "set --attn_implementation, or leave it at auto",
    "use_flash_attention_2": "set --attn_implementation, or leave it at auto",
    "sdp_attention": "set --attn_implementation sdpa instead",
    "xformers_attention": "set --attn_implementation, or leave it at auto",
    "template": "the chat format is read off the tokenizer; --chat_format overrules it",
    "chat_template": "the chat format is read off the tokenizer; --chat_format overrules it",
    "chat_template_path": "the chat format is read off the tokenizer; --chat_format overrules it",
    "prompt_template": "the chat format is read off the tokenizer; --chat_format overrules it",
    "dataset_text_field": "a column `text` is found by itself (--dataset_format text)",
    **dict.fromkeys(
        ("interleave_probs", "mix_strategy", "dataset_mixer", "dataset_mixture", "data_weights",
         "interleave_prob", "stopping_strategy"),
        "sources are weighed by their repeat: --dataset A@2 B@0.5, or mappings in a recipe",
    ),
    "dataset_kwargs": "columns are read by their names; see --dataset_format",
    "formatting_func": "columns are read by their names; see --dataset_format",
    "completion_only_loss": "only completions are trained by default (--train_on assistant)",
    "assistant_only_loss": "only assistant turns are trained by default (--train_on assistant)",
    "train_on_responses_only": "only assistant turns are trained by default (--train_on assistant)",
    "train_on_inputs": "set --train_on all to train on prompts too; the default is assistant",
    "train_on_prompt": "set --train_on all to train on prompts too; the default is assistant",
    "eval_packing": "evaluation is packed as --packing says",
    "packing_strategy": "rows are packed whole and isolated from each other; leave it out",
    "neat_packing": "packed documents are isolated always; leave it out",
    "padding_free": "rows are packed and hold no padding within; leave it out",
    "pad_to_sequence_len": "rows are packed to --max_length always; leave it out",
    "pad_to_multiple_of": "rows are packed to --max_length always; leave it out",
    "group_by_length": "packing balances the rows; leave it out",
    "warmup_ratio": "set --warmup_steps to the share, such as 0.03",
    "logging_dir": "tensorboard writes into output_dir/runs; the environment's "
                   "TENSORBOARD_LOGGING_DIR overrules it",
    "trust_remote_code": "no code of a model or data set is ever run; leave it out",
    "hub_model_revision": "set --model_revision for the base model",
    "no_cuda_device": "set CUDA_VISIBLE_DEVICES in the environment",
    "tensor_parallel_size": "not supported; set --fsdp_size or --ep_size instead",
    "pipeline_parallel_size": "not supported; set --fsdp_size or --ep_size instead",
    "context_parallel_size": "not supported; set --activation_checkpointing for long rows",
    "sequence_parallel_size": "not supported; set --activation_checkpointing for long rows",
    "deepspeed_config": "launch with --config_file config/zero3.json instead",
    "save_safetensors": "weights are always written as safetensors; leave it out",
    "fp8_training": "set --fp8 attention, experts, all or auto instead",
    "safe_serialization": "weights are always written as safetensors; leave it out",
    "resize_vocab": "tokens are not added to the model; leave it out",
    "special_tokens": "tokens are not added to the model; leave it out",
    "add_special_tokens": "tokens are not added to the model; leave it out",
    "plot_loss": "metrics.jsonl has the loss of every step; leave it out",
    "jit_mode_eval": "gone from transformers; leave it out",
    "past_index": "gone from transformers; leave it out",
}  # fmt: skip
_FLOOR = 0.6  # of likeness; below it a name says nothing about what was meant


def describe_unknown(name: str, where: str, known: Collection[str]) -> str:
    """Return what to say of an option that is not known.

    Args:
        name: without dashes in front, with underscores.
        where: "on the command line" or "in FILE:LINE".
        known: names that may be suggested, ours first.
    """
    first = f"unknown option --{name} {where}"
    if sentence := TOLD.get(name):
        return f"{first}: {sentence}"
    nearest = SAME.get(name) or max(known, key=lambda option: _likeness(name, option))
    if name not in SAME and _likeness(name, nearest) < _FLOOR:
        return f"{first}; --help lists all"
    return f"{first}; did you mean --{nearest}? (--help lists all)"


def _likeness(name: str, known: str) -> float:
    """Compare whole names, and either end of a long one: `modle` means model_name_or_path."""
    length = len(name)
    whole, start, end = (
        difflib.SequenceMatcher(None, name, part).ratio()
        for part in (known, known[:length], known[-length:])
    )
    return max(whole, 0.9 * start, 0.9 * end)

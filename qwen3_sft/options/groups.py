"""Where in the help each option stands: one group each, by what people look for.

A test compares the names with the options, so that a new one has to be put somewhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Group:
    """Options that are looked for together.

    Attributes:
        title: what they are about.
        ours: options that this project declares, in their order; their help is in the dataclasses.
        common: options of TrainingArguments that most runs set, and what they do here.
        rare: other ones, for --help_all.
    """

    title: str
    ours: str
    common: dict[str, str] = field(default_factory=dict)
    rare: dict[str, str] = field(default_factory=dict)

    def names(self, *, is_whole: bool) -> dict[str, str]:
        """Return the options of the group and what is said of them, empty where ours."""
        return dict.fromkeys(self.ours.split(), "") | self.common | (self.rare if is_whole else {})


GROUPS = (
    Group(
        "data",
        "dataset dataset_format columns ignore_columns on_bad_row txt_rows dataset_split "
        "dataset_config dataset_revision streaming max_rows "
        "max_length packing overlong train_on thinking train_empty_think chat_format "
        "max_drop_fraction num_proc data_cache_dir",
        {"dataloader_num_workers": "processes that read ahead"},
        {
            "dataloader_prefetch_factor": "batches that each of them reads ahead",
            "dataloader_pin_memory": "copy to the GPU from pinned memory",
            "dataloader_multiprocessing_context": "how they are started",
        },
    ),
    Group(
        "model",
        "model_name_or_path model_revision dtype export_dtype export_layout router_aux_loss_coef",
        rare={"neftune_noise_alpha": "noise on the embeddings, scaled by the packed row"},
    ),
    Group(
        "speed and memory",
        "per_device_train_batch_size global_batch_size activation_checkpointing activation_offload "
        "optimizer_in_backward memory_warm_up attn_implementation experts_implementation use_liger "
        "torch_compile fp8 fp8_recipe fp8_scaling fp8_keep",
        {
            "gradient_accumulation_steps": "micro-batches in one optimizer step",
            "bf16": "compute in bfloat16; on by itself where --dtype auto finds a GPU that can",
            "use_cpu": "train on the CPU although there is a GPU",
        },
        {
            "fp16": "compute in float16, with loss scaling",
            "tf32": "float32 products in TF32",
            "torch_empty_cache_steps": "steps between two emptyings of CUDA's cache; slow",
        },
    ),
    Group(
        "optimizer and schedule",
        "learning_rate lr_scheduler_type num_train_epochs clip max_bad_steps deterministic",
        {
            "max_steps": "optimizer steps; wins over num_train_epochs; -1: as that says",
            "warmup_steps": "of the learning rate from 0: steps, or a share of all below 1",
            "weight_decay": "not of biases and norms",
            "max_grad_norm": "norm that gradients are clipped to; 0: not at all",
            "optim": "README says which need which package",
            "seed": "of the rows' order, the split and dropout",
        },
        {
            "lr_scheduler_kwargs": "JSON object of the schedule's arguments, {\"num_cycles\": 2}",
            "optim_args": "name=value of the optimizer, separated by commas",
            "optim_target_modules": "of GaLore and APOLLO: patterns of module names",
            "adam_beta1": "decay of the first moment",
            "adam_beta2": "decay of the second moment",
            "adam_epsilon": "added to the root of the second moment",
        },
    ),
    Group(
        "evaluation",
        "eval_dataset eval_fraction per_device_eval_batch_size early_stopping_patience num_samples "
        "sample_max_new_tokens",
        {
            "eval_strategy": "when to evaluate",
            "eval_steps": "steps between two evaluations, or a share of all below 1; default: "
                          "logging_steps",
            "load_best_model_at_end": "export the checkpoint with the lowest eval_loss",
        },
        {
            "metric_for_best_model": "loss or eval_loss, which are the same",
            "eval_delay": "steps or epochs before the first evaluation",
            "eval_on_start": "evaluate once before the first step",
        },
    ),
    Group(
        "checkpoints, resume and export",
        "output_dir resume allow_change save_total_limit trust_checkpoint "
        "restore_callback_states_from_checkpoint stop_after_steps dry_run",
        {
            "save_strategy": "when to write a checkpoint",
            "save_steps": "steps between two checkpoints, or a share of all below 1",
            "push_to_hub": "upload the verified export once, after training",
            "hub_model_id": "its name, OWNER/NAME; default: the name of output_dir",
            "hub_private_repo": "false makes it public; private otherwise",
        },
        {
            "hub_token": "of the upload; better: `hf auth login`, or HF_TOKEN",
            "save_only_model": "weights without optimizer: smaller, and not to be resumed from",
            "ignore_data_skip": "begin with the first row after a resume; not exact",
        },
    ),
    Group(
        "several GPUs",
        "fsdp_size ep_size dp_replicate_size dist_timeout_s",
        rare={
            "ddp_backend": "what carries collectives; default: nccl, on CPUs gloo",
            "ddp_bucket_cap_mb": "gradients that DDP reduces at once",
            "ddp_find_unused_parameters": "of torch's DistributedDataParallel",
            "ddp_broadcast_buffers": "of torch's DistributedDataParallel",
            "ddp_static_graph": "of torch's DistributedDataParallel",
        },
    ),
    Group(
        "logging",
        "logging_steps report_to",
        {"run_name": "of the run in reporters"},
        {
            "project": "of the run in trackio",
            "logging_strategy": "when to log",
            "logging_first_step": "log the first step too",
            "log_on_each_node": "on the first process of each node, not of the first alone",
            "log_level": "of transformers",
            "log_level_replica": "the same, of other processes than the first",
            "trackio_space_id": "Space of the hub that trackio reports to",
            "trackio_bucket_id": "bucket beside it",
            "trackio_static_space_id": "Space that only shows it",
        },
    ),
)  # fmt: skip

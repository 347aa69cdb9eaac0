"""Every option of a run, as typed dataclasses.

Options that transformers' TrainingArguments already has keep its name and live there
(`TrainArguments` subclasses it). The data and model options stand apart because the data must be
prepared before TrainingArguments exists: creating one joins the process group, and a corpus that
takes longer to tokenise than the group's timeout would then kill the other ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from transformers import TrainingArguments

from qwen3_sft.options.refused_options import REFUSED

# Values of --experts_implementation that are patches of ours; the others are transformers' own.
EXPERT_PATCHES = ("scatter_moe", "scatter_moe_recompute")


@dataclass
class DataArguments:
    """Where the conversations come from and how they become token rows."""

    dataset: list[str] = field(
        default_factory=list,
        metadata={"help": "files, folders or hub ids; `demo` is the built-in data"},
    )
    dataset_format: Literal[
        "auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text", "tokens"
    ] = field(default="auto", metadata={"help": "auto reads it off the columns of each file"})
    dataset_split: str = field(default="train", metadata={"help": "split of a hub dataset"})
    dataset_config: str | None = field(
        default=None, metadata={"help": "configuration name of a hub dataset"}
    )
    dataset_revision: str | None = field(
        default=None, metadata={"help": "commit, tag or branch of a hub dataset"}
    )
    streaming: bool = field(
        default=False, metadata={"help": "read hub data row by row, never stored as a whole"}
    )
    max_rows: int | None = field(default=None, metadata={"help": "read at most this many rows"})
    eval_dataset: list[str] = field(
        default_factory=list, metadata={"help": "files, folders or hub ids for evaluation"}
    )
    eval_fraction: float = field(
        default=0.0, metadata={"help": "share of the samples held out for evaluation, 0 to 0.5"}
    )
    max_length: int = field(default=4096, metadata={"help": "tokens in one packed row"})
    packing: bool = field(
        default=True, metadata={"help": "several documents in one row, isolated from each other"}
    )
    overlong: Literal["drop", "error", "truncate"] = field(
        default="drop", metadata={"help": "what to do with samples longer than max_length"}
    )
    train_on: Literal["assistant", "last_assistant", "all"] = field(
        default="assistant", metadata={"help": "which tokens carry a label"}
    )
    thinking: Literal["split_turns", "drop_history", "keep"] = field(
        default="split_turns",
        metadata={
            "help": "reasoning in earlier turns: split_turns makes one sample per user turn, each "
            "with the context seen at inference; drop_history trains the last turn only; keep "
            "leaves all reasoning in place (differs from inference)"
        },
    )
    train_empty_think: bool = field(
        default=False,
        metadata={"help": "put labels on an empty <think></think> block too"},
    )
    chat_format: Literal[
        "auto",
        "qwen3",
        "qwen3_instruct_2507",
        "qwen3_thinking_2507",
        "qwen3_coder",
        "qwen3_coder_tools",
    ] = field(default="auto", metadata={"help": "auto reads it off the tokenizer's chat template"})
    max_drop_fraction: float = field(
        default=0.01, metadata={"help": "more dropped rows than this share is an error"}
    )
    num_proc: int | None = field(
        default=None, metadata={"help": "processes that tokenise; default: one per core if large"}
    )
    data_cache_dir: str | None = field(
        default=None,
        metadata={"help": "where token caches live; default ~/.cache/qwen3_sft/tokens"},
    )

    @property
    def has_evaluation(self) -> bool:
        """Whether there will be samples to evaluate on."""
        return bool(self.eval_dataset or self.eval_fraction)


@dataclass
class ModelArguments:
    """Which model to train and what computes it."""

    model_name_or_path: str = field(
        default="",
        metadata={"help": "folder or hub id of a Qwen3-MoE; `demo` builds a tiny one"},
    )
    model_revision: str | None = field(
        default=None, metadata={"help": "commit, tag or branch of a hub model"}
    )
    dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="auto",
        metadata={
            "help": "of the trained weights; auto: float32 (with bf16 autocast where the GPU can)"
        },
    )
    export_dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "of the exported model; auto: the base model's own"}
    )
    experts_implementation: Literal[
        "scatter_moe", "scatter_moe_recompute", "grouped_mm", "batched_mm", "eager"
    ] = field(
        default="scatter_moe",
        metadata={"help": "what computes the experts; _recompute keeps less for the backward pass"},
    )
    attn_implementation: Literal[
        "auto",
        "flash_attention_4",
        "flash_attention_3",
        "flash_attention_2",
        "torch_varlen",
        "sdpa",
        "eager",
    ] = field(default="auto", metadata={"help": "auto takes the best the device and packages have"})
    use_liger: bool | None = field(
        default=None, metadata={"help": "Liger's RMSNorm and RoPE kernels; default: on CUDA"}
    )
    fp8: Literal["off", "attention", "experts", "all", "auto"] = field(
        default="off",
        metadata={
            "help": "which products run in FP8; router, first and last layer, lm_head, embeddings "
            "and norms stay in BF16; auto: what a benchmark on this device has shown to be faster"
        },
    )
    fp8_keep: list[str] = field(
        default_factory=list,
        metadata={"help": "patterns of module names that stay in BF16 too, `*layers.3.*`"},
    )
    fp8_recipe: Literal["rowwise", "tensorwise", "rowwise_with_gw_hp"] = field(
        default="rowwise", metadata={"help": "torchao's scaling of attention's projections"}
    )
    fp8_scaling: Literal["blockwise", "rowwise", "mxfp8"] = field(
        default="blockwise",
        metadata={
            "help": "of the experts: blocks of 128 (weights 128 x 128), whole rows, or powers of "
            "two for blocks of 32 (mxfp8: sm_100 and later; not measured)"
        },
    )
    fsdp_size: int = field(
        default=1,
        metadata={
            "help": "processes that share one copy of the weights (transformers' native FSDP2); "
            "-1: all"
        },
    )
    ep_size: int = field(
        default=1, metadata={"help": "processes that share the experts of a layer; see README"}
    )
    dp_replicate_size: int = field(
        default=1, metadata={"help": "copies of the weights, each over fsdp_size processes"}
    )


@dataclass
class TrainArguments(TrainingArguments):
    """Transformers' TrainingArguments with defaults that fit SFT, and what it lacks."""

    output_dir: str | None = field(default="runs/run", metadata={"help": "the run folder"})
    per_device_train_batch_size: int = field(
        default=1, metadata={"help": "packed rows of max_length tokens per micro-batch"}
    )
    per_device_eval_batch_size: int = field(default=1, metadata={"help": "the same, evaluation"})
    learning_rate: float = field(default=1e-5, metadata={"help": "peak learning rate"})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "its schedule"})
    num_train_epochs: float = field(default=1.0, metadata={"help": "passes over the data"})
    logging_steps: float = field(default=1, metadata={"help": "steps between two log lines"})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "keep False: a hidden NaN is a lie"}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "keep False: the collator's fields are all used"}
    )
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "early stopping goes on counting after a resume"}
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "checkpoints kept"})
    global_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "packed rows in one optimizer step over all processes; sets "
            "gradient_accumulation_steps, so that a step is the same on any number of GPUs"
        },
    )
    resume: str = field(
        default="auto",
        metadata={
            "help": "auto: newest verified checkpoint; never: refuse a used folder; or a path"
        },
    )
    allow_change: list[str] = field(
        default_factory=list,
        metadata={
            "help": "what may differ from the checkpoint's run: global_batch_size, data, template, "
            "tokenizer, max_length, packing, eval_fraction, seed"
        },
    )
    trust_checkpoint: bool = field(
        default=False,
        metadata={"help": "load a checkpoint that may run code; only if you know who wrote it"},
    )
    report_to: list[str] = field(  # type: ignore[bad-override-mutable-attribute]
        default_factory=lambda: ["none"],
        metadata={"help": "wandb, tensorboard, mlflow, trackio, ... or none"},
    )
    router_aux_loss_coef: float | None = field(
        default=None,
        metadata={"help": "load-balancing loss; default: the model config's; 0 switches it off"},
    )
    activation_checkpointing: Literal[  # type: ignore[bad-override-mutable-attribute]
        "none", "selective", "full", "auto"
    ] = field(
        default="none",
        metadata={
            "help": "what the backward pass computes again: full, all but a layer's input; "
            "selective, what costs little; auto, as little as the GPU's memory allows"
        },
    )
    activation_offload: bool = field(
        default=False,
        metadata={"help": "with checkpointing: keep the layers' inputs in host memory"},
    )
    memory_warm_up: bool | None = field(
        default=None,
        metadata={
            "help": "allocate all that training needs before the first step, so that a lack of "
            "memory shows at once; default: on a GPU"
        },
    )
    max_bad_steps: int = field(
        default=3, metadata={"help": "non-finite steps in a row that stop the run"}
    )
    optimizer_in_backward: bool = field(
        default=False,
        metadata={
            "help": "update each weight and free its gradient within the backward pass; one "
            "process, no accumulation, and --clip per_tensor or delayed"
        },
    )
    clip: Literal["global", "delayed", "per_tensor"] = field(
        default="global",
        metadata={
            "help": "what max_grad_norm holds: the norm of all gradients; with "
            "--optimizer_in_backward each tensor's (per_tensor), or all by the norm of the step "
            "before (delayed)"
        },
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "evaluations without improvement that stop the run"}
    )
    num_samples: int = field(
        default=3, metadata={"help": "held-out prompts completed at each evaluation"}
    )
    sample_max_new_tokens: int = field(default=64, metadata={"help": "length of a completion"})
    torch_compile: bool = field(
        default=False, metadata={"help": "compile each decoder layer, not the model as a whole"}
    )
    dist_timeout_s: int = field(
        default=1800,
        metadata={
            "help": "seconds after which a collective gives up on a node or network that was lost; "
            "a rank that died, failed or was stopped ends the run within a minute"
        },
    )
    stop_after_steps: int | None = field(
        default=None,
        metadata={
            "help": "end after this many steps from where the run starts, without saving or "
            "exporting (qwen3-sft resume --verify)"
        },
    )
    dry_run: bool = field(
        default=False, metadata={"help": "print command, patches and memory, then stop"}
    )
    # What this project puts in place itself; transformers sees its own switches off.
    checkpointing: Literal["none", "selective", "full", "auto"] = field(init=False, default="none")
    compiles_layers: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        """Refuse what would be ignored or wrong here, then let transformers check the rest.

        Raises:
            ValueError: naming the option and what to use instead.
        """
        for name, (bad, reason) in REFUSED.items():
            if getattr(self, name) not in bad:
                raise ValueError(f"--{name} {getattr(self, name)}: {reason}")
        self.checkpointing = self.activation_checkpointing
        self.activation_checkpointing = False  # type: ignore[bad-assignment]
        self.compiles_layers, self.torch_compile = self.torch_compile, False
        self.ddp_timeout = self.dist_timeout_s
        super().__post_init__()

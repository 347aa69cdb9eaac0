"""The options of training: transformers' TrainingArguments with defaults that fit SFT, and more.

An option that TrainingArguments already has keeps its name. Those of the data and the model stand
apart because the data must be prepared before TrainingArguments exists: creating one joins the
process group, and a corpus that takes longer to tokenise than the group's timeout would then kill
the other ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from transformers import TrainingArguments


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
            "help": "options that may differ from those of the checkpoint's run, such as "
            "learning_rate or data; the error that asks for it says what follows"
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
    deterministic: bool = field(
        default=False,
        metadata={
            "help": "the same bits in every run on the same GPUs, also after a resume; attention's "
            "backward pass gets slower"
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
        """Switch off upstream's own code for what is done here, then let transformers check.

        Raises:
            ValueError: transformers refuses a value.
        """
        self.checkpointing = self.activation_checkpointing
        self.activation_checkpointing = False  # type: ignore[bad-assignment]
        self.compiles_layers, self.torch_compile = self.torch_compile, False
        self.ddp_timeout = self.dist_timeout_s
        self.push_to_hub, self.hub_token = False, None  # export/upload.py reads the draft
        super().__post_init__()

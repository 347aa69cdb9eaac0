"""Options of transformers that a run does not take, and what to set instead."""

from __future__ import annotations

_OFF: tuple[object, ...] = (False, None, "", 0, 0.0)
# option -> (values that are fine, why the others are not)
REFUSED: dict[str, tuple[tuple[object, ...], str]] = {
    "use_liger_kernel": (_OFF, "Liger is applied while loading; set --use_liger instead"),
    "label_smoothing_factor": (_OFF, "would need the full logits; not supported"),
    "auto_find_batch_size": (_OFF, "a row is max_length tokens; lower --max_length instead"),
    "dataloader_persistent_workers": (_OFF, "workers must see each epoch's packing; leave it off"),
    "dataloader_drop_last": (_OFF, "the packing already fills the last step; leave it off"),
    "remove_unused_columns": ((False,), "the model needs every field of the batch; leave it off"),
    "logging_nan_inf_filter": ((False,), "would hide non-finite losses; leave it off"),
    "enable_jit_checkpoint": (_OFF, "not exact with dropout; not supported"),
    "resume_from_checkpoint": (_OFF, "set --resume PATH instead"),
    "ddp_timeout": ((1800,), "set --dist_timeout_s instead"),
    "train_sampling_strategy": (("random",), "packing balances the rows; leave it at random"),
    "gradient_checkpointing": (_OFF, "set --activation_checkpointing full or selective instead"),
    "gradient_checkpointing_kwargs": (_OFF, "set --activation_checkpointing instead"),
    "activation_checkpointing_kwargs": (_OFF, "see --activation_checkpointing and _offload"),
    "torch_compile_backend": (_OFF, "layers are compiled by inductor; leave it out"),
    "torch_compile_mode": (_OFF, "not supported; leave it out"),
    "fsdp": (("", None, False, []), "launch with --config_file config/fsdp.json instead"),
    "deepspeed": (_OFF, "launch with --config_file config/zero3.json or config/zero2.json instead"),
}  # fmt: skip

"""The model card of an export: what it was made from and how, and nothing private.

Only listed hyper-parameters, and names only of what lies on the hub: paths, file names and run
names of the user's are nobody else's business.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from qwen3_sft.options.data_entries import read_entries
from qwen3_sft.options.recipe import Options

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_SHOWN = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs", "max_steps",
    "global_batch_size", "per_device_train_batch_size", "gradient_accumulation_steps", "max_length",
    "packing", "train_on", "thinking", "optim", "weight_decay", "adam_beta1", "adam_beta2",
    "adam_epsilon", "max_grad_norm", "router_aux_loss_coef", "dtype", "seed",
)  # fmt: skip


def model_card(options: Options, versions: dict[str, str]) -> str:
    """Return the text of README.md.

    Args:
        options: of the run.
        versions: of packages, by name.
    """
    base = _hub_ids([options.model.model_name_or_path])
    entries = read_entries(options.data.dataset, "--dataset")
    data = _hub_ids([entry.path.partition(":")[0] for entry in entries])
    head: dict[str, Any] = {"library_name": "transformers", "tags": ["qwen3-sft", "sft"]}
    if base:
        head["base_model"] = base[0]
    if data:
        head["datasets"] = data
    values = options.values()
    rows = [(n, getattr(values[n], "value", values[n])) for n in _SHOWN if values[n] is not None]
    lines = [
        "---", yaml.safe_dump(head, sort_keys=False).rstrip(), "---", "",
        "# Supervised fine-tuning with qwen3-sft", "",
        f"Base model: {base[0] if base else 'not on the hub'}. "
        f"Data: {', '.join(data) or 'not on the hub'}.", "",
        "| hyper-parameter | value |", "|---|---|",
        *(f"| {n} | {value} |" for n, value in rows), "",
        "Versions: " + ", ".join(f"{n} {v}" for n, v in versions.items()) + ".",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _hub_ids(names: Sequence[str]) -> list[str]:
    return [name for name in names if _HUB_ID.fullmatch(name) and not Path(name).exists()]

"""What a small run trains: a base model with random weights, and conversations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qwen3_sft.demo.model import write_checkpoint
from tests.support.data_rows import sums


def write_inputs(folder: Path, tokenizer: Any) -> tuple[str | Path, ...]:
    """Write `base` and `rows.jsonl`, 40 conversations; return the options that name them."""
    write_checkpoint(folder / "base", tokenizer)
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, sums(40))))
    return (
        "--model_name_or_path", folder / "base", "--dataset", folder / "rows.jsonl",
        "--data_cache_dir", folder / "cache",
    )  # fmt: skip

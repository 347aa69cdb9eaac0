"""The embedded demo: `--model_name_or_path demo --dataset demo` built on the spot."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

from filelock import FileLock

from qwen3_sft.demo import conversations
from qwen3_sft.demo.model import train_tokenizer, write_checkpoint
from qwen3_sft.errors import UsageError
from qwen3_sft.options.data_args import DataArguments
from qwen3_sft.options.data_entries import read_entries, with_paths

NAME = "demo"
VOCAB_SIZE = 4096
_LOCK = ".lock"  # the first file in a folder, so its presence means that it is ours


def build_demo(folder: Path) -> tuple[Path, Path]:
    """Make the tiny model and the conversations in `folder`, once, whichever rank comes first.

    Returns:
        The model folder (hub layout, random weights) and the JSON lines file.

    Raises:
        UsageError: what lies in the folder is not a demo.
    """
    refuse_foreign(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model, data = folder / "model", folder / "conversations.jsonl"
    with FileLock(folder / _LOCK):
        if not data.exists():  # written last, so its presence means that both are whole
            partial = data.with_suffix(".partial")
            # In a process of its own: what is imported here changes the standard library (torch
            # replaces functions of `inspect`, transformers adds methods to `logging.Logger`).
            command = [sys.executable, "-I", conversations.__file__, str(partial)]
            # It hears no Ctrl-C, and is ended by this process, which does.
            subprocess.run(command, check=True, start_new_session=True)
            rows = map(json.loads, partial.read_text(encoding="utf-8").splitlines())
            texts = (message["content"] for row in rows for message in row["messages"])
            write_checkpoint(model, train_tokenizer(texts, VOCAB_SIZE))
            partial.rename(data)
    return model, data


def refuse_foreign(folder: Path) -> None:
    """Refuse a folder that is there and holds something else than a demo.

    Raises:
        UsageError: naming it.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: a file stands where the demo is built; remove it")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / _LOCK).exists():
        raise UsageError(
            f"{folder} holds something else than a demo, which is built there: choose another "
            "--output_dir, or move that away"
        )


def uses_demo(model: str, data: DataArguments) -> bool:
    """Whether the name `demo` stands for a model or for data."""
    entries = read_entries(data.dataset, "--dataset")
    return NAME in (model, *(entry.path for entry in entries))


def resolve_demo(
    model: str, data: DataArguments, folder: Path | None = None
) -> tuple[str, DataArguments]:
    """Replace the name `demo` by what it stands for; leave everything else as it is.

    Args:
        model: folder, hub id or `demo`.
        data: its `dataset` may contain `demo`.
        folder: where to build it; by default ~/.cache/qwen3_sft/demo.
    """
    if not uses_demo(model, data):
        return model, data
    demo_model, demo_data = build_demo(folder or Path.home() / ".cache" / "qwen3_sft" / "demo")
    sources = with_paths(
        data.dataset, "--dataset", lambda path: str(demo_data) if path == NAME else path
    )
    return str(demo_model) if model == NAME else model, dataclasses.replace(data, dataset=sources)

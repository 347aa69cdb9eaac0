"""`qwen3-sft export`: a checkpoint of a run as a hub model, verified."""

from __future__ import annotations

import argparse
from pathlib import Path

from qwen3_sft.checkpoints.folders import checkpoints
from qwen3_sft.checkpoints.manifest import MANIFEST
from qwen3_sft.errors import DONE, UsageError
from qwen3_sft.logs import set_up_logging
from qwen3_sft.options.paths import expanded
from qwen3_sft.records.folder_lock import held, lock_beside
from qwen3_sft.records.overlap import refuse_export_over_source
from qwen3_sft.records.ownership import refuse_foreign_export


def export_command(argv: list[str]) -> int:
    """Run `CHECKPOINT FOLDER [--option value ...]`; return the exit code.

    Raises:
        UsageError: a path names a variable that is not set, no checkpoint is named, or the folder
            is not ours to replace, overlaps the checkpoint, or is in use.
        ModelError: the checkpoint's model is not one that this project trains.
        CheckpointError: it is damaged, or loading it might run code.
        ExportError: what was written does not reproduce it.
    """
    set_up_logging()
    own = parse(argv)
    refuse_export_over_source(own.checkpoint, own.folder)
    refuse_foreign_export(own.folder)
    with held(lock_beside(own.folder), own.folder):
        return _export(own)


def _export(own: argparse.Namespace) -> int:
    _require_checkpoint(own.checkpoint)
    import torch

    from qwen3_sft.checkpoints.hub_metadata import turn_ends_of
    from qwen3_sft.checkpoints.manifest import read_manifest
    from qwen3_sft.checkpoints.whole import load_checkpoint
    from qwen3_sft.export.export import export_model
    from qwen3_sft.model.loading import load_tokenizer

    model = load_checkpoint(own.checkpoint, trusted=own.trust_checkpoint == "true")
    tokenizer = load_tokenizer(own.checkpoint)
    ends = turn_ends_of(read_manifest(own.checkpoint), tokenizer, own.checkpoint)
    export_model(
        model, own.checkpoint, own.folder, getattr(torch, own.dtype), turn_ends=ends,
        layout=own.export_layout,
    )  # fmt: skip
    return DONE


def parse(argv: list[str]) -> argparse.Namespace:
    """Return what the words say, each under its name."""
    parser = argparse.ArgumentParser(prog="qwen3-sft export")
    parser.add_argument("checkpoint")
    parser.add_argument("folder")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument(
        "--export_layout", "--export-layout", choices=("hub", "fused"), default="hub",
        help="names of the weights: the released models', or transformers 5's own",
    )  # fmt: skip
    parser.add_argument(
        "--trust_checkpoint", "--trust-checkpoint", nargs="?", const="true", default="false",
        choices=("true", "false"),
        help="load it although that might run code; only if you know who wrote it",
    )  # fmt: skip
    own = parser.parse_args(argv)
    own.checkpoint = Path(expanded(own.checkpoint, "CHECKPOINT"))
    own.folder = Path(expanded(own.folder, "FOLDER"))
    return own


def _require_checkpoint(folder: Path) -> None:
    """Say what to give where a run folder, a model or nothing was named.

    Raises:
        UsageError: it is no checkpoint.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; give a checkpoint of a run, RUN/checkpoint-N")
    if (folder / MANIFEST).is_file():
        return
    if inside := checkpoints(folder):
        raise UsageError(f"{folder} is a run, not a checkpoint; its newest is {inside[-1]}")
    if (folder / "config.json").is_file():
        raise UsageError(f"{folder} holds a model, not a checkpoint of a run: it needs no export")

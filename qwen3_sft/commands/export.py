"""`qwen3-sft export`: a checkpoint of a run as a hub model, verified."""

from __future__ import annotations

import argparse
from pathlib import Path

from qwen3_sft.errors import DONE
from qwen3_sft.logs import set_up_logging
from qwen3_sft.records.folder_lock import held, lock_beside
from qwen3_sft.records.overlap import refuse_export_over_source
from qwen3_sft.records.ownership import refuse_foreign_export


def export_command(argv: list[str]) -> int:
    """Run `CHECKPOINT FOLDER [--dtype DTYPE] [--trust_checkpoint true]`; return the exit code.

    Raises:
        UsageError: the folder is not ours to replace, overlaps the checkpoint, or is in use.
        ModelError: the checkpoint's model is not one that this project trains.
        CheckpointError: it is damaged, or loading it might run code.
        ExportError: what was written does not reproduce it.
    """
    set_up_logging()
    parser = argparse.ArgumentParser(prog="qwen3-sft export")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument(
        "--trust_checkpoint", nargs="?", const="true", default="false", choices=("true", "false"),
        help="load it although that might run code; only if you know who wrote it",
    )  # fmt: skip
    own = parser.parse_args(argv)
    refuse_export_over_source(own.checkpoint, own.folder)
    refuse_foreign_export(own.folder)
    with held(lock_beside(own.folder), own.folder):
        return _export(own)


def _export(own: argparse.Namespace) -> int:
    import torch

    from qwen3_sft.checkpoints.whole import load_checkpoint
    from qwen3_sft.export.export import export_model

    model = load_checkpoint(own.checkpoint, trusted=own.trust_checkpoint == "true")
    export_model(model, own.checkpoint, own.folder, getattr(torch, own.dtype))
    return DONE

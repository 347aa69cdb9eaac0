"""Write a trained model as a hub checkpoint and prove that it loads as it was trained.

transformers' conversion gives the hub's per-expert names. Added here: one tensor at a time instead
of a second copy of the model, whatever engine holds it; the base model's own tokenizer, template
and generation files, in which the tokens that were trained to end a turn end it, and the keys that
other readers look for (`checkpoints/hub_metadata.py`); and a reload that compares every tensor and
the logits of a probe, and generates, before the folder gets its final name.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from qwen3_sft.checkpoints.folders import publish
from qwen3_sft.checkpoints.hub_metadata import (
    GENERATION,
    complete_metadata,
    token_id,
    write_configs,
)
from qwen3_sft.checkpoints.hub_writer import MAX_SHARD_BYTES, HubWriter, Layout
from qwen3_sft.checkpoints.state_tensors import full_tensors
from qwen3_sft.distributed.rank_zero import RankZero
from qwen3_sft.errors import ExportError
from qwen3_sft.export.check import Expected, check_export, digest, probe
from qwen3_sft.model.loading import TOKENIZER_FILES, load_tokenizer
from qwen3_sft.records.folder_lock import held, lock_beside
from qwen3_sft.records.ownership import mark_export, refuse_foreign_export

logger = logging.getLogger(__name__)

# Seconds between two signs of life from rank 0 while it checks; far below any group's timeout.
_SIGN_OF_LIFE_S = 60.0

# The launcher's and engines' variables: with them the check would look for other processes.
_HIDDEN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_HIDDEN_PREFIXES = ("ACCELERATE_", "FSDP_", "TORCHELASTIC_", "DS_")


def export_model(
    model: Any,
    base: Path,
    folder: Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    *,
    turn_ends: Sequence[str] = (),
    layout: Layout = "hub",
    source: Path | None = None,
    card: str | None = None,
) -> None:
    """Export `model` to `folder` in hub layout, verified.

    Collective: call it on every rank, with any engine. Rank 0 alone reads `base` and writes, and
    holds one file's tensors and, while it gathers and converts, up to three copies of one tensor
    beside its own part of the model. The check is a process on the CPU with one copy of the model.
    It may take longer than the process group's timeout, so rank 0 takes part in a small broadcast
    every minute: the others wait for as long as rank 0 lives, and no longer than that timeout
    (`--dist_timeout_s`) after its last sign of life.

    Args:
        model: the trained model, unwrapped; its parameters stay as they are.
        base: the checkpoint it started from; its tokenizer and generation files are copied.
        folder: replaced if it is empty or an earlier export, and only after the new one is
            verified; a link is followed.
        dtype: of the written weights; None takes the base model's.
        max_shard_bytes: of the tensors in one file.
        turn_ends: tokens that end a labelled turn, the most important first; without any the base's
            end tokens stay.
        layout: of the weights: the hub's names, or transformers 5's own with fused experts.
        source: what the mark of the export names; `base` by default.
        card: text of README.md, None for none.

    Raises:
        ExportError: on every rank. The folder is in use or not ours to replace; a key, shape,
            dtype, value or the probe's logits differ after reloading; or rank 0 could not read,
            convert or write something.
    """
    rank0 = RankZero(folder, raises=ExportError)
    with ExitStack() as locks:
        rank0.do(locks.enter_context, held(lock_beside(folder), folder))
        export = rank0.do(
            _Export, model, base, folder, dtype, max_shard_bytes, card, turn_ends, layout
        )
        dtype = rank0.agree(export.dtype if export else None)
        for name, tensor in full_tensors(model, dtype):
            if tensor is not None:
                # After a failure the loop goes on, without writing: the others are in it as well.
                rank0.do(export.add, name, tensor)
        rank0.agree()
        logits = probe(model)
        rank0.do(lambda: export.finish(logits, source or base, rank0.sign_of_life))
        rank0.agree()


class _Export:
    """Rank 0's part: a folder that is written aside, checked and published."""

    def __init__(
        self, model: Any, base: Path, folder: Path, dtype: torch.dtype | None, max_shard_bytes: int,
        card: str | None, turn_ends: Sequence[str], layout: Layout,
    ) -> None:  # fmt: skip
        refuse_foreign_export(folder)
        self.dtype = base_dtype(base) if dtype is None else dtype
        self._folder = folder.resolve()
        self._staging = self._folder.with_name(f".{self._folder.name}.qwen3_sft-partial")
        shutil.rmtree(self._staging, ignore_errors=True)
        self._staging.mkdir(parents=True)
        logger.info("exporting to %s: writing, reloading, comparing", folder)
        self._turn_ends = _write_metadata(model, base, self._staging, self.dtype, turn_ends)
        if card is not None:
            (self._staging / "README.md").write_text(card, encoding="utf-8")
        self._writer = HubWriter(model, self._staging, self.dtype, max_shard_bytes, layout=layout)
        self._layout = layout
        self._digests: dict[str, str] = {}
        # Here a GPU has no room, Liger has replaced classes, or ZeRO-3 would shard what is loaded.
        self._is_isolated = model.device.type != "cpu" or is_deepspeed_zero3_enabled()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write one entry of the state dict."""
        self._digests[name] = digest(self._writer.add(name, tensor))

    def finish(self, logits: torch.Tensor, source: Path, on_wait: Callable[[], None]) -> None:
        """Check, mark and publish.

        Raises:
            ExportError: the model differs.
            UsageError: somebody has put something into the folder meanwhile.
        """
        self._writer.close()
        expected = Expected(self._digests, logits, self._turn_ends)
        verify(self._staging, expected, is_isolated=self._is_isolated, on_wait=on_wait)
        name = str(self.dtype).removeprefix("torch.")
        mark_export(self._staging, source, name, self._layout)
        refuse_foreign_export(self._folder)
        publish(self._staging, self._folder)
        logger.info(
            "exported %s (%s, %d tensors, %.1f GB, reloaded and compared)", self._folder,
            self.dtype, self._writer.num_tensors, self._writer.num_bytes / 1e9,
        )  # fmt: skip


def verify(
    folder: Path,
    expected: Expected,
    *,
    is_isolated: bool,
    on_wait: Callable[[], None] = lambda: None,
) -> None:
    """Reload `folder` and compare.

    Args:
        folder: the written checkpoint.
        expected: what the live model holds and says.
        is_isolated: in a fresh process on the CPU, as somebody else would load it. Needed where a
            GPU has no room for a second copy or Liger has replaced classes of transformers.
        on_wait: called every minute while that process runs.

    Raises:
        ExportError: what differs.
    """
    if not is_isolated:
        check_export(folder, expected)
        return
    notes = folder / ".expected"
    expected.save(notes)
    command = [sys.executable, "-m", "qwen3_sft.export.check", str(folder), str(notes)]
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in _HIDDEN and not key.startswith(_HIDDEN_PREFIXES)
    }
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            output, errors = _communicate(process, on_wait)
        finally:
            process.kill()  # only matters when another rank has died meanwhile
    shutil.rmtree(notes)
    if process.returncode:
        lines = (errors or output).strip().splitlines()
        raise ExportError(lines[-1] if lines else f"{folder}: the check ended without a word")


def _communicate(process: subprocess.Popen[str], on_wait: Callable[[], None]) -> tuple[str, str]:
    while True:
        try:
            return process.communicate(timeout=_SIGN_OF_LIFE_S)
        except subprocess.TimeoutExpired:
            on_wait()


def base_dtype(base: Path) -> torch.dtype:
    """Return the dtype a checkpoint's config names; float32 if it names none."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    return getattr(torch, str(name).removeprefix("torch."))


def _write_metadata(
    model: Any, base: Path, folder: Path, dtype: torch.dtype, turn_ends: Sequence[str]
) -> tuple[int, ...]:
    """Write all but the weights; return the ids of the tokens that end a labelled turn."""
    write_configs(model, folder, dtype)
    for name in (*TOKENIZER_FILES, GENERATION):
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    tokenizer = load_tokenizer(folder)
    complete_metadata(folder, tokenizer, turn_ends)
    if not turn_ends:
        logger.warning("no labelled turn has an end token: generation stops where the base did")
    return tuple(token_id(tokenizer, token, folder) for token in turn_ends)

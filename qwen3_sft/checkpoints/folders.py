"""Checkpoints that are whole or absent, and a resume that restores everything.

Two faults of the stock Trainer are mended here. It saves experts one by one (hub names) but loads
with `strict=False` into fused tensors, so that a resumed run silently continues with the base
model's experts (transformers issue 48805). And it writes in place, so that a killed save leaves a
folder which looks like the newest checkpoint. A checkpoint is therefore written aside, sealed with
`manifest.json` (every file, its size and hash) and renamed; loading goes through the same
conversion as `from_pretrained` and refuses any missing or unexpected weight.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from pathlib import Path

from qwen3_sft.checkpoints.manifest import verify
from qwen3_sft.errors import CheckpointError

logger = logging.getLogger(__name__)

STAGING = ".saving"

_NAME = re.compile(r"checkpoint-(\d+)")
# Folders on their way out; the rest of their name is the one they had.
_REPLACED, _REMOVED = ".replaced-", ".removed-"


def newest_verified(output_dir: Path) -> tuple[Path | None, list[str]]:
    """Return the newest whole checkpoint and why newer ones were passed over."""
    _put_back(output_dir)
    passed_over = []
    for folder in reversed(checkpoints(output_dir)):
        logger.info("verifying %s", folder)
        try:
            verify(folder)
        except CheckpointError as error:
            passed_over.append(str(error))
        else:
            return folder, passed_over
    return None, passed_over


def checkpoints(output_dir: Path) -> list[Path]:
    """Return the folders named checkpoint-N, whole or not, by step."""
    folders = [p for p in output_dir.glob("checkpoint-*") if p.is_dir() and _NAME.fullmatch(p.name)]
    return sorted(folders, key=step_of)


def step_of(folder: Path) -> int:
    """Return N of `checkpoint-N`."""
    match = _NAME.fullmatch(folder.name)
    if match is None:
        raise CheckpointError(f"{folder}: not named checkpoint-N")
    return int(match.group(1))


def publish(staged: Path, final: Path) -> None:
    """Give a sealed folder its final name; one that has it already is removed afterwards.

    Whoever is killed in between leaves the old folder or the new one: the old one is renamed, and
    if the new one did not come, `newest_verified` and the next save put it back.
    """
    replaced = final.with_name(_REPLACED + final.name)
    for path in (*staged.rglob("*"), staged):
        _sync(path)
    if final.exists():
        if replaced.exists():
            shutil.rmtree(replaced)
        os.rename(final, replaced)
    os.rename(staged, final)
    _sync(final.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def remove(folder: Path) -> None:
    """Remove a checkpoint; one that is removed by half does not look like one.

    Raises:
        OSError: it cannot be removed.
    """
    removed = folder.with_name(_REMOVED + folder.name)
    if removed.exists():
        shutil.rmtree(removed)
    os.rename(folder, removed)
    shutil.rmtree(removed)


def clear_leftovers(output_dir: Path) -> None:
    """Remove what saves and removals have left that were killed.

    Raises:
        OSError: it cannot be removed.
    """
    _put_back(output_dir)
    for pattern in (STAGING, f"{_REPLACED}*", f"{_REMOVED}*"):
        for path in list(output_dir.glob(pattern)):
            shutil.rmtree(path)


def _put_back(output_dir: Path) -> None:
    """Finish what `publish` did not: between its renames nothing has the final name."""
    for replaced in list(output_dir.glob(f"{_REPLACED}*")):
        final = output_dir / replaced.name.removeprefix(_REPLACED)
        if not final.exists():
            logger.warning("%s was being replaced when the run ended; it is put back", final)
            os.rename(replaced, final)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

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

from qwen3_sft.checkpoints.manifest import MANIFEST, added_files, read_manifest, verify
from qwen3_sft.errors import CheckpointError
from qwen3_sft.records.ownership import EXPORT_MARK, is_export

logger = logging.getLogger(__name__)

STAGING = ".saving"

_NAME = re.compile(r"checkpoint-(\d+)")
# Folders on their way out; the rest of their name is the one they had.
_REPLACED, _REMOVED = ".replaced-", ".removed-"
# Names that a run folder has only from us (`refuse_foreign_run`), whatever is left inside.
_LEFTOVER = re.compile(r"\.saving|\.(removed|replaced)-checkpoint-\d+")


def newest_verified(output_dir: Path) -> tuple[Path | None, list[str]]:
    """Return the newest whole checkpoint and why newer ones were passed over."""
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
    if the new one did not come, the next start and the next save put it back (`put_back`).

    Raises:
        CheckpointError: what has the name already was not written by us.
    """
    refuse_foreign(final)
    replaced = final.with_name(_REPLACED + final.name)
    for path in (*staged.rglob("*"), staged):
        _sync(path)
    if final.exists():
        if replaced.exists():
            if not _may_go(replaced):
                refuse_foreign(replaced)
            _drop(replaced)
        os.rename(final, replaced)
    os.rename(staged, final)
    _sync(final.parent)
    if replaced.exists() and _may_go(replaced):
        _drop(replaced)


def is_ours(folder: Path) -> bool:
    """Whether a folder is empty, or a checkpoint that we sealed or an export, and nothing more."""
    if not folder.is_dir() or folder.is_symlink():
        return False
    is_checkpoint = is_sealed(folder) and not added_files(folder)
    return is_checkpoint or is_export(folder) or not any(folder.iterdir())


def is_sealed(folder: Path) -> bool:
    """Whether a folder has a manifest of ours, whatever has become of the files."""
    try:
        read_manifest(folder)
    except CheckpointError:
        return False
    return True


def refuse_foreign(folder: Path) -> None:
    """Refuse to replace what we have not written.

    Raises:
        CheckpointError: naming it.
    """
    if folder.exists() and not is_ours(folder):
        raise CheckpointError(
            f"{folder} was not written by us ({_foreign(folder)}) and is not replaced: move that "
            "away, or choose another --output_dir"
        )


def _foreign(folder: Path) -> str:
    """Return in words what makes a folder another's than ours, wholly or in part."""
    if folder.is_symlink():
        return "it is a link"
    if not is_sealed(folder):
        return f"it has no {MANIFEST}"
    return f"no save wrote {', '.join(added_files(folder)[:3])}"


def remove(folder: Path) -> None:
    """Remove a checkpoint; one that is removed by half does not look like one.

    Raises:
        CheckpointError: it is a link, or somebody has put files into it.
        OSError: it cannot be removed.
    """
    if not is_ours(folder):
        raise CheckpointError(f"{folder} stays: {_foreign(folder)}")
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
    put_back(output_dir)
    for path in list(output_dir.iterdir()):
        if _may_go(path):
            _drop(path)


def put_back(output_dir: Path) -> None:
    """Finish what `publish` did not: between its renames nothing has the final name."""
    for replaced in filter(_may_go, list(output_dir.glob(f"{_REPLACED}*"))):
        final = output_dir / replaced.name.removeprefix(_REPLACED)
        if not final.exists():
            logger.warning("%s was being replaced when the run ended; it is put back", final)
            os.rename(replaced, final)


def _may_go(path: Path) -> bool:
    """Whether what a killed save or removal has left is ours, by its name or its sign."""
    is_put_aside = path.name.startswith(_REPLACED) and is_ours(path)
    return bool(_LEFTOVER.fullmatch(path.name)) or is_put_aside


def _drop(folder: Path) -> None:
    """Remove a folder, and last the sign that it is ours: what a kill leaves has it still."""
    for path in list(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in (MANIFEST, EXPORT_MARK):
            path.unlink()
    shutil.rmtree(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Which checkpoints are removed once a new one is in its place: never the last whole one."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerState

from qwen3_sft.checkpoints.folders import checkpoints, is_sealed, remove, step_of
from qwen3_sft.checkpoints.manifest import check_sizes
from qwen3_sft.errors import CheckpointError

logger = logging.getLogger(__name__)


def rotate(output_dir: Path, limit: int | None, written: Path, best: str | None = None) -> None:
    """Remove the oldest whole checkpoints beyond `limit`, and damaged ones that are superseded.

    As upstream's, but by step instead of by time, and a damaged folder (files of another size)
    never takes a whole one's place. The one just written, the newest and the best stay, even if
    these are more than `limit`; they count towards it. A folder without a manifest of ours is the
    user's: it neither goes nor counts.

    Args:
        output_dir: holds the checkpoints.
        limit: value of --save_total_limit; None or 0 removes nothing.
        written: the checkpoint that was just published.
        best: path of the best checkpoint, if one is known.
    """
    if not limit or limit < 0:
        return
    whole, damaged = [], []
    for folder in filter(is_sealed, checkpoints(output_dir)):
        (whole if _is_whole(folder) else damaged).append(folder)
    if not whole:
        return
    stays = {written.name, whole[-1].name, Path(best or "").name}
    for folder in damaged:
        if step_of(folder) <= step_of(whole[-1]) and folder.name not in stays:
            _remove(folder, "it is damaged, and a whole one is as new")
    kept = max(limit, sum(folder.name in stays for folder in whole))
    old = [folder for folder in whole if folder.name not in stays]
    for folder in old[: max(0, len(whole) - kept)]:
        _remove(folder, f"--save_total_limit {limit}")


@contextmanager
def only_ours_removed(args: Any, state: TrainerState, output_dir: Path) -> Iterator[None]:
    """End training inside: upstream's end keeps the best checkpoint alone if the limit is 1.

    It would remove every other folder named checkpoint-N, also the user's (transformers 5.23).
    """
    limit, args.save_total_limit = args.save_total_limit, None
    yield
    args.save_total_limit = limit
    if limit != 1 or not args.should_save or state.best_model_checkpoint is None:
        return
    for folder in filter(is_sealed, checkpoints(output_dir)):
        if folder.name != Path(state.best_model_checkpoint).name:
            _remove(folder, "--save_total_limit 1, it is not the best")


def _is_whole(folder: Path) -> bool:
    try:
        check_sizes(folder)
    except CheckpointError:
        return False
    return True


def _remove(folder: Path, reason: str) -> None:
    try:
        remove(folder)
    except CheckpointError as error:
        logger.warning("%s; --save_total_limit would remove it", error)
    except OSError as error:  # the new checkpoint is whole all the same
        logger.warning("%s could not be removed: %s", folder, error)
    else:
        logger.info("removed %s: %s", folder, reason)

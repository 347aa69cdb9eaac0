"""Splits that a dataset's README.md declares, as of a repository cloned from the hub."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Collection
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from qwen3_sft.data.files.splits import Splits, glob_regex, splits_of
from qwen3_sft.errors import DataError

if TYPE_CHECKING:
    from datasets.utils.metadata import MetadataConfigs


def declared_splits(folder: Path, files: Collection[PurePath], config: str | None) -> Splits | None:
    """Sort files, given relative to their folder, by the `configs` of its README.md.

    Args:
        folder: may have a README.md whose header declares `configs` with `data_files`.
        files: the data files of the folder.
        config: the name of one; None takes the default one.

    Returns:
        None if nothing is declared.

    Raises:
        DataError: the header is broken, has no such configuration or several without a default,
            or no file is one that it names.
    """
    configs = _configs(folder / "README.md")
    if not configs:
        return None
    name = config or configs.get_default_config_name()
    if name not in configs:
        which = f"no configuration {name!r} in" if name else "several configurations in"
        raise DataError(
            f"{folder}: {which} its README.md, which has {', '.join(configs)}: "
            "set --dataset_config, or name the files"
        )
    chosen = configs[name]
    data_dir, data_files = chosen.get("data_dir") or "", chosen.get("data_files")
    if not data_files:
        inside = [file for file in files if file.is_relative_to(data_dir)]
        return _only(splits_of(inside, folder), files) if inside else None
    splits = _matched(files, data_dir, data_files)
    if not splits:
        raise DataError(f"{folder}: no file is of the data_files of {name!r} in its README.md")
    return _only(Splits(splits, [], are_told=True), files)


def _configs(card: Path) -> MetadataConfigs | None:
    """Return what a card declares; None without a card or a header."""
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCardData, metadata_load
    from yaml import YAMLError

    if not card.is_file() or not card.read_bytes().startswith(b"---"):
        return None
    try:
        declared = (metadata_load(card) or {}).get("configs")
        configs = MetadataConfigs.from_dataset_card_data(DatasetCardData(configs=declared))
        configs.get_default_config_name()
    except (ValueError, TypeError, YAMLError) as error:
        raise DataError(
            f"{card}: cannot read the header between its --- lines, which may tell splits: {error}"
        ) from error
    return configs


def _matched(
    files: Collection[PurePath], data_dir: str, data_files: str | list
) -> dict[str, list[PurePath]]:
    """Return the files of each split that has any."""
    from datasets.data_files import sanitize_patterns

    found = {}
    for split, patterns in sanitize_patterns(data_files).items():
        listed = [patterns] if isinstance(patterns, str) else patterns
        regexes = [
            glob_regex(posixpath.normpath(posixpath.join(data_dir, pattern))) for pattern in listed
        ]
        if of_split := [f for f in files if any(re.match(r, f.as_posix()) for r in regexes)]:
            found[split] = of_split
    return found


def _only(splits: Splits, files: Collection[PurePath]) -> Splits:
    """Return the splits with all other files among those that have none."""
    named = {file for of_split in splits.files.values() for file in of_split}
    return Splits(splits.files, [file for file in files if file not in named], are_told=True)

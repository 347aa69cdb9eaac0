"""What lies in a folder is ours or the user's: the signs that tell, and what is refused by them.

A run folder is ours by the mark that a run writes first; by `environment.json` or a sealed
checkpoint where an earlier version made it. An exported model is ours by its mark, which lists the
files of the export: with anything else in it the folder is not replaced.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from qwen3_sft.errors import UsageError
from qwen3_sft.records.run_folder import versions

EXPORT_MARK = "qwen3_sft_export.json"
RUN_MARK = "qwen3_sft_run.json"

# What a run overwrites or removes in its folder without a look at who wrote it.
OVERWRITTEN = re.compile(
    r"\.saving|\.(removed|replaced)-checkpoint-\d+|"
    r"config\.yaml|metrics\.jsonl|samples\.jsonl|INTERRUPTED|\.INTERRUPTED\.partial|"
    r"\.?(environment|data_report|eval_data_report|plan_check|summary)\.json(\.partial)?"
)
# What it replaces or removes if it carries a sign of ours.
REPLACED = re.compile(r"checkpoint-\d+|model")


def is_run(folder: Path) -> bool:
    """Whether a run of ours has begun in a folder, of this version or of an earlier one."""
    return (
        _holds(folder / RUN_MARK, "versions")
        or _holds(folder / "environment.json", "versions", "engine", "world_size")
        or any(
            _holds(manifest, "files", "layout", "step")
            for manifest in folder.glob("checkpoint-*/manifest.json")
        )
    )


def refuse_foreign_run(folder: Path) -> None:
    """Refuse a folder that is not a run's and holds what a run would overwrite.

    Raises:
        UsageError: naming what lies there, and what to do.
    """
    if not folder.is_dir() or is_run(folder):
        return
    if foreign := [path.name for path in folder.iterdir() if OVERWRITTEN.fullmatch(path.name)]:
        raise UsageError(
            f"--output_dir {folder} is no run folder of qwen3-sft (no {RUN_MARK}) and holds "
            f"{_listed(foreign)}, which a run would overwrite: choose another folder, or move "
            "that away"
        )


def refuse_foreign_export(folder: Path) -> None:
    """Refuse to replace what is neither empty nor an earlier export of ours.

    Raises:
        UsageError: naming what lies there, and what to do.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: a file stands in the export's place; remove it")
    if foreign := _beside_export(folder):
        raise UsageError(
            f"{folder} holds {_listed(foreign)}, not written by an export of ours (which its "
            f"{EXPORT_MARK} would list), and an export replaces the whole folder: choose another "
            "one, or move that away"
        )


def is_export(folder: Path) -> bool:
    """Whether a folder is an export of ours with nothing else in it."""
    return (folder / EXPORT_MARK).is_file() and not _beside_export(folder)


def mark_run(folder: Path) -> None:
    """Make a folder a run's; the first file that a run writes there."""
    if not (folder / RUN_MARK).exists():
        _write(folder / RUN_MARK, {"versions": _own_versions()})


def mark_export(folder: Path, source: Path, dtype: str, layout: str = "hub") -> None:
    """Say in a whole export that it is one; no folder of this machine, models are passed on.

    Args:
        folder: with all its files.
        source: the run or the checkpoint.
        dtype: of the weights.
        layout: of their names, `hub` or `fused`.
    """
    facts = {
        "versions": _own_versions(),
        "source": "/".join(source.absolute().parts[-2:]),
        "dtype": dtype,
        "layout": layout,
        "files": sorted(path.name for path in folder.iterdir()),
    }
    _write(folder / EXPORT_MARK, facts)


def _own_versions() -> dict[str, str]:
    kept = ("qwen3-sft", "torch", "transformers")
    return {name: found for name, found in versions().items() if name in kept}


def _write(path: Path, facts: dict[str, Any]) -> None:
    path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _beside_export(folder: Path) -> list[str]:
    """Return what lies in a folder that its mark does not list; without a mark everything."""
    if not folder.is_dir():
        return []
    files = _read(folder / EXPORT_MARK).get("files")
    ours = {EXPORT_MARK, *files} if isinstance(files, list) else set()
    return [path.name for path in folder.iterdir() if path.name not in ours or path.is_dir()]


def _holds(path: Path, *keys: str) -> bool:
    return _read(path).keys() >= {*keys}


def _read(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; an empty one if it holds none."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # JSON and UTF-8 alike
        return {}
    return found if isinstance(found, dict) else {}


def _listed(names: list[str]) -> str:
    first = ", ".join(sorted(names)[:4])
    return first if len(names) <= 4 else f"{first} and {len(names) - 4} more"

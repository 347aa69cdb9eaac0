"""Result files are replaced in one step: a run that is cut off leaves the last whole one."""

from __future__ import annotations

from pathlib import Path


def write(path: Path, text: str) -> None:
    """Write `text` to `path`; folders that are missing are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)

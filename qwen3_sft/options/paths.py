"""Paths as people write them: `~` and `$HOME` are expanded once, where options are parsed.

Left to each reader, one part of a run would write to the home folder and another to a folder that
is literally called `~`.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from qwen3_sft.errors import UsageError
from qwen3_sft.options import data_entries

# Options that name a file or a folder, or a list of them; hub ids and words are left as they are.
PATH_OPTIONS = (
    "output_dir", "model_name_or_path", "dataset", "eval_dataset", "resume", "data_cache_dir",
)  # fmt: skip
_VARIABLE = re.compile(r"\$\w|\$\{")


def expanded(text: str, name: str) -> str:
    """Return a path with its home folder and variables filled in.

    Args:
        text: as it was written.
        name: what it is, for the message: `--output_dir`.

    Raises:
        UsageError: it names a variable that is not set, or the home of an unknown user.
    """
    path = os.path.expanduser(os.path.expandvars(text))
    if path.startswith("~") or (_VARIABLE.search(path) and not Path(path).exists()):
        raise UsageError(
            f"{name} {text}: no such variable or home folder; write the path out, or put ./ before "
            "a name that begins with ~"
        )
    return path


def with_expanded_paths(name: str, value: Any) -> Any:
    """Return the value of an option; if it is a path or a list of them, expanded.

    Raises:
        UsageError: as `expanded`.
    """
    if name not in PATH_OPTIONS or value is None:
        return value
    if name in data_entries.OPTIONS:
        return data_entries.with_paths(value, f"--{name}", lambda path: expanded(path, f"--{name}"))
    return expanded(value, f"--{name}")


def refuse_unwritable(folder: Path, option: str) -> None:
    """Refuse a folder that could not be made or written to, and make nothing.

    Raises:
        UsageError: naming the option, and the part of the path that is in the way.
    """
    there = folder.absolute()
    while not there.exists() and not there.is_symlink():
        there = there.parent
    if not there.is_dir():
        raise UsageError(f"{option} {folder}: {there} is no folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"{option} {folder}: {there} is not writable")

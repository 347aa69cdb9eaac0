"""The entries of `dataset` and `eval_dataset`: a path, or a mapping with what else it says.

In a recipe an entry may be a mapping, which travels as its JSON text; on the command line
`PATH@2` repeats a source. The keys are those of TRL's dataset mixtures (`trl.scripts.utils`,
`path name split columns`), with `format`, `repeat` and `max_rows` beside them.
"""

from __future__ import annotations

import difflib
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from qwen3_sft.errors import UsageError
from qwen3_sft.options.listing import listing

OPTIONS = ("dataset", "eval_dataset")


@dataclass(frozen=True)
class DataEntry:
    """One source of a mixture; what is None is as the options say that count for all sources.

    Attributes:
        path: file, folder or hub id, with its split behind a colon if it names one.
        name: configuration of a hub dataset, or of a folder's README.md.
        split: of a folder or a hub dataset.
        format: of the rows.
        columns: what the format's columns are called here, KNOWN=NAME.
        repeat: passes over it in one epoch, whole or not.
        max_rows: read at most this many.
    """

    path: str
    name: str | None = None
    split: str | None = None
    format: str | None = None
    columns: tuple[str, ...] | None = None
    repeat: float = 1.0
    max_rows: int | None = None

    @property
    def text(self) -> str:
        """The entry as an option has it."""
        said = {n: v for n, v in asdict(self).items() if v not in (None, 1.0) or n == "max_rows"}
        said = {n: v for n, v in said.items() if v is not None}
        is_plain = set(said) == {"path"} and read_entry(self.path, "").path == self.path
        return self.path if is_plain else json.dumps(said)


def read_entry(text: str, option: str) -> DataEntry:
    """Return what an entry says.

    Args:
        text: a path, `PATH@REPEAT`, or the JSON text of a mapping.
        option: its name, for the message: `--dataset`.

    Raises:
        UsageError: a key is unknown or its value cannot be.
    """
    if text.startswith("{"):
        return _mapping(text, option)
    path, at, repeat = text.rpartition("@")
    if not at or not path or Path(text).exists() or not _is_number(repeat):
        return DataEntry(text)
    return DataEntry(path, repeat=_passes(float(repeat), f"{option} {text}"))


def read_entries(texts: Sequence[str], option: str) -> list[DataEntry]:
    """Return the entries of an option.

    Raises:
        UsageError: as `read_entry`, or an evaluation is to be repeated.
    """
    entries = [read_entry(text, option) for text in texts]
    for entry in entries:
        if option == "--eval_dataset" and entry.repeat != 1.0:
            raise UsageError(
                f"{option} {entry.path}: repeat {entry.repeat:g}: an evaluation reads each row "
                "once; leave it out"
            )
    return entries


def with_paths(texts: Sequence[str], option: str, change: Callable[[str], str]) -> list[str]:
    """Return the entries of an option with every path replaced by `change(path)`."""
    entries = read_entries(texts, option)
    return [replace(entry, path=change(entry.path)).text for entry in entries]


def source_names(entries: Sequence[DataEntry]) -> list[str]:
    """Return a short name for each entry, all different: the file's or folder's own name."""
    names = [_name(entry, parents=0) for entry in entries]
    if len(set(names)) < len(names):
        names = [_name(entry, parents=1) for entry in entries]
    seen: Counter[str] = Counter()
    for index, name in enumerate(names):
        seen[name] += 1
        names[index] = name if seen[name] == 1 else f"{name}-{seen[name]}"
    return names


def _name(entry: DataEntry, *, parents: int) -> str:
    path = Path(entry.path)
    last = path.name.partition(".")[0] or path.name
    parts = [*path.parent.parts[-parents:], last] if parents else [last]
    words = [*(part.strip("/") for part in parts), entry.name, entry.split]
    return "-".join(word.replace(":", "-").replace("/", "-") for word in words if word)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _passes(repeat: float, where: str) -> float:
    if not 0 < repeat < math.inf:
        raise UsageError(f"{where}: repeat {repeat:g} must be above 0; leave the entry out for 0")
    return repeat


def _mapping(text: str, option: str) -> DataEntry:
    try:
        said: dict[str, Any] = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"{option} {text}: not JSON ({error})") from error
    known = [field.name for field in fields(DataEntry)]
    for key in said:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UsageError(f"{option} {text}: unknown key {key!r}{hint} ({', '.join(known)})")
    said = {key: value for key, value in said.items() if value is not None}
    where = f"{option} {said.get('path', text)}"
    for key in ("path", "name", "split", "format"):
        if not isinstance(said.get(key, "" if key == "path" else "x"), str) or said.get(key) == "":
            raise UsageError(f"{where}: {key} {said[key]!r} must be a word")
    if not said.get("path"):
        raise UsageError(f"{where}: an entry needs a path")
    _check_format(said.get("format"), where)
    if "columns" in said:
        said["columns"] = _columns(said["columns"], where)
    if "repeat" in said:
        said["repeat"] = _passes(_number(said["repeat"], f"{where}: repeat"), where)
    if "max_rows" in said and (type(said["max_rows"]) is not int or said["max_rows"] < 1):
        raise UsageError(f"{where}: max_rows {said['max_rows']!r} must be a whole number above 0")
    return DataEntry(**said)


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UsageError(f"{what} {value!r} must be a number")
    return float(value)


def _check_format(name: str | None, where: str) -> None:
    choices = listing()["dataset_format"].choices
    if name is not None and name not in choices:
        raise UsageError(f"{where}: format {name!r} must be one of {', '.join(choices)}")


def _columns(value: Any, where: str) -> tuple[str, ...]:
    """Return KNOWN=NAME words of a mapping, or of a list of such words."""
    pairs = (
        [f"{known}={name}" for known, name in value.items()] if isinstance(value, dict) else value
    )
    if not isinstance(pairs, list) or not all(isinstance(p, str) and "=" in p for p in pairs):
        raise UsageError(
            f"{where}: columns {value!r} must be a mapping such as {{prompt: question}}"
        )
    return tuple(pairs)

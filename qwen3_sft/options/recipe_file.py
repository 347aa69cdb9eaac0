"""A recipe (YAML) as words of a command line, each with the line that it stands in."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qwen3_sft.errors import UsageError
from qwen3_sft.options import data_entries


@dataclass(frozen=True)
class Entry:
    """An option in a recipe.

    Attributes:
        name: of the option, with underscores.
        where: file and line.
        value: None, a word, words, or the JSON text of a mapping as a one-element tuple.
    """

    name: str
    where: str
    value: str | list[str] | tuple[str] | None


# Not an option: the GPUs that a recipe was made for, such as 8xH200, which `plan` then takes.
PLANNED_FOR = "planned_for"
_MERGE = "tag:yaml.org,2002:merge"  # of `<<`


class _UniqueKeys(yaml.SafeLoader):
    """YAML lets a key that is repeated win silently; here it is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value if key.tag != _MERGE]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key!r} stands twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


def read_recipe(path: Path, texts: Collection[str]) -> list[Entry]:
    """Return the options of a recipe in their order.

    Args:
        path: of the file.
        texts: options that take words as they are written: YAML would read `off`, `no` and
            `0123456` as something else.

    Raises:
        UsageError: the file cannot be read, is no UTF-8, no YAML or no list of options.
    """
    text = _text(path)
    try:
        loader = _UniqueKeys(text)
        node = loader.get_single_node()
        if node is None:
            return []
        if not isinstance(node, yaml.MappingNode):
            content = loader.construct_object(node, deep=True)
            if content is None:
                return []
            kind = type(content).__name__
            raise UsageError(f"{path}: expected `key: value` lines, found a {kind}")
        loader.construct_mapping(node, deep=True)  # resolves merges, too
        entries: dict[str, Entry] = {}
        spelled: dict[str, str] = {}
        for key, value in node.value:
            entry = _entry(path, key, value, loader, texts)
            if spelled.setdefault(entry.name, key.value) != key.value:
                raise UsageError(f"{entry.where}: {entry.name} stands twice")
            entries[entry.name] = entry  # what a merge brings along comes first
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{path}: not valid YAML: {error}") from error
    return list(entries.values())


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise UsageError(f"--config {path}: no such file") from error
    except OSError as error:
        raise UsageError(f"--config {path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--config {path}: not UTF-8 ({error}); save it as UTF-8") from error


def _word(node: yaml.Node, value: Any, name: str, where: str) -> str:
    """Return an entry of a list, one of a mixture of data as JSON if it is a mapping."""
    if isinstance(node, yaml.MappingNode) and name in data_entries.OPTIONS:
        try:
            return json.dumps(value)
        except TypeError as error:
            raise UsageError(f"{where}: {name}: {error}") from error
    if not isinstance(node, yaml.ScalarNode) or value is None:
        raise UsageError(f"{where}: {name}: every entry of the list must be a word")
    return str(node.value)


def _entry(
    path: Path, key: yaml.Node, node: yaml.Node, loader: _UniqueKeys, texts: Collection[str]
) -> Entry:
    name = str(key.value).replace("-", "_")
    where = f"{path}:{key.start_mark.line + 1}"
    value: Any = loader.construct_object(node, deep=True)
    if isinstance(node, yaml.MappingNode):
        try:
            return Entry(name, where, (json.dumps(value),))
        except TypeError as error:
            raise UsageError(f"{where}: {name}: {error}") from error
    if isinstance(node, yaml.SequenceNode):
        return Entry(
            name, where, [_word(*both, name, where) for both in zip(node.value, value, strict=True)]
        )
    if value is None:
        return Entry(name, where, None)
    return Entry(name, where, str(node.value) if name in texts else str(value))

"""A recipe (YAML) plus a command line become values by name; the command line wins.

Both go through the same argparse definitions, so a wrong value in a recipe is found exactly as on
the command line, and an unknown name is an error that suggests the nearest one. Nothing heavy is
imported: whoever has misspelt an option is told before torch is there.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

from qwen3_sft.errors import UsageError
from qwen3_sft.options.combinations import check_combinations
from qwen3_sft.options.judged_options import REFUSED
from qwen3_sft.options.known_elsewhere import describe_unknown
from qwen3_sft.options.listing import Listed, listing
from qwen3_sft.options.paths import expanded, with_expanded_paths
from qwen3_sft.options.recipe_file import PLANNED_FOR, Entry, read_recipe
from qwen3_sft.options.values import check_value

_DEMO = "; no recipe is named: the demo is --config config/recipe/demo.yaml"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


@dataclass(frozen=True)
class Given:
    """What a recipe and a command line say.

    Attributes:
        values: of every option, checked, paths expanded.
        recipe: the file that was named, None without one.
        planned_for: the GPUs that the recipe was made for, such as `8xH200`; None if it names none.
    """

    values: dict[str, Any]
    recipe: str | None
    planned_for: str | None


def read_options(argv: list[str], *, needs_data: bool = True) -> Given:
    """Read `[--config RECIPE] [--flag value ...]`.

    Args:
        argv: the words.
        needs_data: whether a missing dataset is an error; a plan needs none.

    Raises:
        UsageError: unknown option (with the nearest known name), wrong value, missing model or
            dataset, options that contradict each other.
    """
    parser = _parser()
    pre, rest = _config_parser().parse_known_args(argv)
    recipe = None if pre.config is None else expanded(pre.config, "--config")
    entries = [] if recipe is None else read_recipe(Path(recipe), _texts())
    planned_for = _planned_for(entries)
    words, places = _recipe_words([e for e in entries if e.name != PLANNED_FOR], parser)
    namespace, unknown = parser.parse_known_args([*words, *rest])
    if unknown:
        raise UsageError(_unknown(unknown[0], "on the command line"))
    values = _checked(vars(namespace), places, rest)
    _check(values, needs_data=needs_data, demo="" if recipe else _DEMO)
    return Given(values, recipe, planned_for)


def default_values() -> dict[str, Any]:
    """Return the default of every option by name."""
    return vars(_parser().parse_args([]))


def _parser() -> _Parser:
    parser = _Parser(prog="qwen3-sft train", allow_abbrev=False, add_help=False)
    for name, option in listing().items():
        _add(parser, name, option)
    return parser


def _add(parser: _Parser, name: str, option: Listed) -> None:
    # Of what is refused any value gets its sentence.
    reads = str if name in REFUSED and option.kind == "str" else option.reads
    choices = None if name in REFUSED else option.choices or None
    default = [*option.default] if isinstance(option.default, list) else option.default
    parser.add_argument(
        *_spellings(name), default=default, type=reads, choices=choices, nargs=option.nargs,
        const=True if option.nargs == "?" else None,
    )  # fmt: skip
    if option.kind == "switch" and option.default is True:
        parser.add_argument(
            *_spellings(f"no_{name}"), dest=name, action="store_false", default=True
        )


def _spellings(name: str) -> list[str]:
    return list(dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"]))


def _config_parser() -> _Parser:
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", default=None)
    return parser


def _texts() -> set[str]:
    """Options that take words as they are written."""
    return {name for name, option in listing().items() if option.kind == "str"} | {PLANNED_FOR}


def _checked(values: dict[str, Any], places: dict[str, str], argv: list[str]) -> dict[str, Any]:
    """Return values with their paths expanded; blame the recipe's line unless `argv` wins."""
    found = dict(values)
    given = {word[2:].split("=")[0].replace("-", "_") for word in argv if word.startswith("--")}
    for name, value in values.items():
        with _blamed_on(None if {name, f"no_{name}"} & given else places.get(name)):
            check_value(name, value)
            found[name] = with_expanded_paths(name, value)
    return found


@contextmanager
def _blamed_on(where: str | None) -> Iterator[None]:
    """Put a line of a recipe before the message of an error."""
    try:
        yield
    except UsageError as error:
        raise error if where is None else UsageError(f"{where}: {error}") from error


def _planned_for(entries: list[Entry]) -> str | None:
    for entry in entries:
        if entry.name == PLANNED_FOR:
            if not isinstance(entry.value, str) or not entry.value.strip():
                raise UsageError(f"{entry.where}: {PLANNED_FOR}: write it as 8xH200")
            return entry.value
    return None


def _recipe_words(entries: list[Entry], parser: _Parser) -> tuple[list[str], dict[str, str]]:
    """Return a recipe's words and where each option stands; a null becomes the default."""
    words: list[str] = []
    places: dict[str, str] = {}
    for entry in entries:
        option = listing().get(entry.name)
        if option is None:
            raise UsageError(_unknown(f"--{entry.name}", f"in {entry.where}"))
        places[entry.name] = entry.where
        with _blamed_on(entry.where):
            if entry.value is None:
                if not option.nullable:
                    raise UsageError(f"{entry.name} cannot be null; leave it out for its default")
                parser.set_defaults(**{entry.name: None})
                continue
            own = _words(entry, option)
            parser.parse_known_args(own)  # here, where it is known whom to blame
        words += own
    return words, places


def _words(entry: Entry, option: Listed) -> list[str]:
    name, value = entry.name, entry.value
    if isinstance(value, tuple):
        if not option.is_mapping:
            raise UsageError(f"--{name} {value[0]}: must be a word or a number, not a mapping")
        return [f"--{name}={value[0]}"]
    if not isinstance(value, list):
        return [f"--{name}={value}"]
    if value and option.nargs != "+":
        raise UsageError(f"--{name} {value}: takes one value, not a list")
    for word in value:
        if word.startswith("-"):
            raise UsageError(f"--{name} has the entry {word!r}; entries cannot begin with -")
    return [f"--{name}", *value] if value else []


def _unknown(token: str, where: str) -> str:
    if not token.startswith("--"):
        return f"unexpected value {token!r} {where}"
    name = token[2:].split("=")[0].replace("-", "_")
    known = [option for option in listing() if option not in REFUSED]  # ours come first
    return describe_unknown(name, where, known)


def _check(values: dict[str, Any], *, needs_data: bool, demo: str) -> None:
    if not values["model_name_or_path"]:
        raise UsageError(
            f"no model: set --model_name_or_path to a folder or hub id (or `demo`){demo}"
        )
    if needs_data and not values["dataset"]:
        raise UsageError(f"no data: set --dataset to files, folders or hub ids (or `demo`){demo}")
    check_combinations(SimpleNamespace(**values))

"""A recipe (YAML) plus a command line become typed options; the command line wins.

Both go through the same argparse definitions, so a wrong value in a recipe is found exactly as on
the command line, and an unknown name is an error that suggests the nearest one.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from qwen3_sft.errors import UsageError
from qwen3_sft.options.combinations import check_combinations
from qwen3_sft.options.data_args import DataArguments
from qwen3_sft.options.draft import TrainDraft
from qwen3_sft.options.judged_options import REFUSED
from qwen3_sft.options.known_elsewhere import describe_unknown
from qwen3_sft.options.model_args import ModelArguments
from qwen3_sft.options.paths import expanded, with_expanded_paths
from qwen3_sft.options.recipe_file import Entry, read_recipe
from qwen3_sft.options.secret_options import is_secret
from qwen3_sft.options.train_args import TrainArguments
from qwen3_sft.options.values import check_value

_KINDS = (ModelArguments, DataArguments, TrainArguments)
_NUMBERS = (int, float, string_to_bool)  # and switches: what YAML reads as we do


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


@dataclasses.dataclass(frozen=True)
class Options:
    """All options of one run, never changed in place.

    Attributes:
        model: which model, and what computes it.
        data: where the conversations come from, and how they become rows.
        train: all others; `train.arguments()` comes last, it joins the process group.
        recipe: the file that was named, None without one.
    """

    model: ModelArguments
    data: DataArguments
    train: TrainDraft
    recipe: str | None

    @property
    def output_dir(self) -> Path:
        """The run folder."""
        return Path(str(self.train.output_dir))

    def replaced(self, **values: Any) -> Options:
        """Return a copy with other values, whichever of the three they belong to."""
        parts: dict[str, Any] = {"model": self.model, "data": self.data, "train": self.train}
        for name, part in parts.items():
            names = {field.name for field in dataclasses.fields(part)} & values.keys()
            parts[name] = dataclasses.replace(part, **{key: values.pop(key) for key in names})
        if values:
            raise TypeError(f"no options are called {sorted(values)}")
        return Options(**parts, recipe=self.recipe)

    def values(self) -> dict[str, Any]:
        """Return every option by name."""
        return {**vars(self.model), **vars(self.data), **self.train.values()}

    def resolved(self) -> dict[str, Any]:
        """Every option that differs from its default, plus model, data and output: a recipe.

        Secrets are left out: give them again, or set HF_TOKEN.
        """
        values = self.values()
        defaults = vars(_parser().parse_args([]))
        for name in ("dry_run", "allow_change", "trust_checkpoint", "stop_after_steps"):
            defaults[name] = values[name]  # how it was called, not part of a recipe
        always = {"model_name_or_path", "dataset", "output_dir", "max_length", "learning_rate"}
        shown = {k: v for k, v in values.items() if not is_secret(k)}
        if values["global_batch_size"] is not None:  # which a run has translated for its processes
            del shown["gradient_accumulation_steps"]
        return {k: v for k, v in shown.items() if k in always or v != defaults[k]}


def parse_options(argv: list[str], *, needs_data: bool = True) -> Options:
    """Parse `[--config RECIPE] [--flag value ...]`.

    Args:
        argv: the words.
        needs_data: whether a missing dataset is an error; a plan needs none.

    Raises:
        UsageError: unknown option (with the nearest known name), wrong value, missing model or
            dataset.
    """
    parser = _parser()
    pre, rest = _config_parser().parse_known_args(argv)
    recipe = None if pre.config is None else expanded(pre.config, "--config")
    words, places = ([], {}) if recipe is None else _recipe_words(Path(recipe), parser)
    namespace, unknown = parser.parse_known_args([*words, *rest])
    if unknown:
        raise UsageError(_unknown(unknown[0], parser, "on the command line"))
    values = _checked(vars(namespace), places, rest)
    options = Options(
        model=ModelArguments(**_pick(values, ModelArguments)),
        data=DataArguments(**_pick(values, DataArguments)),
        train=TrainDraft(**_pick(values, TrainArguments)),
        recipe=recipe,
    )
    _check(options, needs_data=needs_data)
    return options


def _parser() -> _Parser:
    parser = _Parser(
        list(_KINDS),  # type: ignore[arg-type]
        prog="qwen3-sft train",
        allow_abbrev=False,
        add_help=False,
    )
    for action in parser._actions:  # of what is refused any value gets its sentence
        if action.dest in REFUSED and action.type not in _NUMBERS:
            action.type = str
    return parser


def help_text() -> str:
    """Return the description of every option."""
    return "--config RECIPE.yaml, then any of:\n" + _parser().format_help()


def _config_parser() -> _Parser:
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", default=None)
    return parser


def _pick(values: dict[str, Any], kind: type) -> dict[str, Any]:
    return {field.name: values[field.name] for field in dataclasses.fields(kind) if field.init}


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


def _recipe_words(path: Path, parser: _Parser) -> tuple[list[str], dict[str, str]]:
    """Return a recipe's words and where each option stands; a null becomes the default."""
    actions = {action.dest: action for action in reversed(parser._actions)}  # not --no_...
    texts = {name for name, action in actions.items() if action.type not in _NUMBERS}
    words: list[str] = []
    places: dict[str, str] = {}
    for entry in read_recipe(path, texts):
        if entry.name not in actions:
            raise UsageError(_unknown(f"--{entry.name}", parser, f"in {entry.where}"))
        places[entry.name] = entry.where
        with _blamed_on(entry.where):
            if entry.value is None:
                _check_null(entry.name)
                parser.set_defaults(**{entry.name: None})
                continue
            own = _words(entry, actions[entry.name])
            parser.parse_known_args(own)  # here, where it is known whom to blame
        words += own
    return words, places


def _check_null(name: str) -> None:
    for kind in _KINDS:
        if name in (hints := get_type_hints(kind)) and type(None) not in get_args(hints[name]):
            raise UsageError(f"{name} cannot be null; leave it out for its default")


def _words(entry: Entry, action: argparse.Action) -> list[str]:
    name, value = entry.name, entry.value
    if isinstance(value, tuple):
        if not any("dict" in str(get_type_hints(kind).get(name)) for kind in _KINDS):
            raise UsageError(f"--{name} {value[0]}: must be a word or a number, not a mapping")
        return [f"--{name}={value[0]}"]
    if not isinstance(value, list):
        return [f"--{name}={value}"]
    if value and action.nargs != "+":
        raise UsageError(f"--{name} {value}: takes one value, not a list")
    for word in value:
        if word.startswith("-"):
            raise UsageError(f"--{name} has the entry {word!r}; entries cannot begin with -")
    return [f"--{name}", *value] if value else []


def _unknown(token: str, parser: _Parser, where: str) -> str:
    if not token.startswith("--"):
        return f"unexpected value {token!r} {where}"
    name = token[2:].split("=")[0].replace("-", "_")
    known = [a.dest for a in parser._actions if a.dest not in REFUSED]  # ours come first
    return describe_unknown(name, where, known)


def _check(options: Options, *, needs_data: bool) -> None:
    if not options.model.model_name_or_path:
        raise UsageError("no model: set --model_name_or_path to a folder or hub id (or `demo`)")
    if needs_data and not options.data.dataset:
        raise UsageError("no data: set --dataset to files, folders or hub ids (or `demo`)")
    check_combinations(options.data, options.train)

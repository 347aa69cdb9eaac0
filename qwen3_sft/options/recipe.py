"""A recipe (YAML) plus a command line become typed options; the command line wins.

Both go through the same argparse definitions, so a wrong value in a recipe is found exactly as on
the command line, and an unknown name is an error that suggests the nearest one.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import yaml
from transformers import HfArgumentParser

from qwen3_sft.errors import UsageError
from qwen3_sft.options.data_args import DataArguments
from qwen3_sft.options.draft import TrainDraft
from qwen3_sft.options.model_args import ModelArguments
from qwen3_sft.options.paths import expanded, with_expanded_paths
from qwen3_sft.options.refused_options import REFUSED
from qwen3_sft.options.secret_options import is_secret
from qwen3_sft.options.train_args import TrainArguments

_KINDS = (ModelArguments, DataArguments, TrainArguments)


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
    tokens = [] if recipe is None else _recipe_tokens(Path(recipe), parser)
    namespace, unknown = parser.parse_known_args([*tokens, *rest])
    if unknown:
        raise UsageError(_unknown(unknown[0], parser, "on the command line"))
    values = with_expanded_paths(vars(namespace))
    options = Options(
        model=ModelArguments(**_pick(values, ModelArguments)),
        data=DataArguments(**_pick(values, DataArguments)),
        train=TrainDraft(**_pick(values, TrainArguments)),
        recipe=recipe,
    )
    _check(options, needs_data=needs_data)
    return options


def _parser() -> _Parser:
    return _Parser(
        list(_KINDS),  # type: ignore[arg-type]
        prog="qwen3-sft train",
        allow_abbrev=False,
        add_help=False,
    )


def help_text() -> str:
    """Return the description of every option."""
    return "--config RECIPE.yaml, then any of:\n" + _parser().format_help()


def _config_parser() -> _Parser:
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", default=None)
    return parser


def _pick(values: dict[str, Any], kind: type) -> dict[str, Any]:
    return {field.name: values[field.name] for field in dataclasses.fields(kind) if field.init}


def _recipe_tokens(path: Path, parser: _Parser) -> list[str]:
    """Turn a recipe into command line tokens; a null becomes the parser's default."""
    known = {action.dest for action in parser._actions}
    tokens: list[str] = []
    for key, value in _load_recipe(path).items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise UsageError(_unknown(f"--{name}", parser, f"in {path}"))
        if value is None:
            _check_null(name, path)
            parser.set_defaults(**{name: None})
        elif isinstance(value, list):
            tokens += _list_tokens(name, value, path)
        else:
            text = json.dumps(value) if isinstance(value, dict) else str(value)
            tokens.append(f"--{name}={text}")
    return tokens


def _load_recipe(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UsageError(f"--config {path}: no such file")
    try:
        recipe = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys) or {}
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise UsageError(f"{path}: expected `key: value` lines, found a {type(recipe).__name__}")
    return recipe


class _UniqueKeys(yaml.SafeLoader):
    """YAML lets a key that is repeated win silently; here it is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key!r} stands twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


def _check_null(name: str, path: Path) -> None:
    for kind in _KINDS:
        if name in (hints := get_type_hints(kind)) and type(None) not in get_args(hints[name]):
            raise UsageError(f"{path}: {name} cannot be null; leave it out for its default")


def _list_tokens(name: str, values: list[Any], path: Path) -> list[str]:
    words = [str(value) for value in values]
    for word in words:
        if word.startswith("-"):
            raise UsageError(f"{path}: {name} has the entry {word!r}; entries cannot begin with -")
    return [f"--{name}", *words] if words else []


def _unknown(token: str, parser: _Parser, where: str) -> str:
    if not token.startswith("--"):
        return f"unexpected value {token!r} {where}"
    name = token[2:].split("=")[0].replace("-", "_")
    names = [a.dest for a in parser._actions if a.dest not in REFUSED]  # ours come first
    nearest = _ALIASES.get(name) or max(names, key=lambda known: _likeness(name, known))
    return f"unknown option --{name} {where}; did you mean --{nearest}? (--help lists all)"


# What other tools call an option of ours.
_ALIASES = {
    "batch_size": "per_device_train_batch_size",
    "micro_batch_size": "per_device_train_batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "epochs": "num_train_epochs",
    "lr": "learning_rate",
    "max_seq_length": "max_length",
    "seq_length": "max_length",
    "cutoff_len": "max_length",
    "model": "model_name_or_path",
    "model_path": "model_name_or_path",
    "data": "dataset",
    "data_path": "dataset",
    "output": "output_dir",
}


def _likeness(name: str, known: str) -> float:
    """Compare whole names, and either end of a long one: `modle` means model_name_or_path."""
    length = len(name)
    whole, start, end = (
        difflib.SequenceMatcher(None, name, part).ratio()
        for part in (known, known[:length], known[-length:])
    )
    return max(whole, 0.9 * start, 0.9 * end)


def _check(options: Options, *, needs_data: bool) -> None:
    if not options.model.model_name_or_path:
        raise UsageError("no model: set --model_name_or_path to a folder or hub id (or `demo`)")
    if needs_data and not options.data.dataset:
        raise UsageError("no data: set --dataset to files, folders or hub ids (or `demo`)")
    if not 0 <= options.data.eval_fraction <= 0.5:
        raise UsageError(f"--eval_fraction {options.data.eval_fraction}: must be 0 to 0.5")
    if options.data.eval_fraction and options.data.eval_dataset:
        raise UsageError("--eval_fraction and --eval_dataset are both set: choose one")
    for name in ("num_proc", "max_rows"):
        value = getattr(options.data, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} {value}: must be at least 1")
    for name in ("run_name", "project"):
        value = str(getattr(options.train, name))
        if set(value) & {"/", "\\", "\0"} or value.startswith("."):
            raise UsageError(
                f"--{name} {value}: a name, not a path, since reporters name files after it; "
                "leave out / and \\ and a leading dot"
            )
    if options.data.max_length < 8:
        raise UsageError(f"--max_length {options.data.max_length}: must be at least 8")

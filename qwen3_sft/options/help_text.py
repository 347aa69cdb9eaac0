"""What `--help` and `--help_all` print: every option in its group, with choices and default."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from functools import partial
from typing import Any

from qwen3_sft.options.groups import GROUPS
from qwen3_sft.options.listing import Listed, listing
from qwen3_sft.options.values import RULES

_WIDTHS = (80, 100)
_VALUES = {"int": "N", "float": "X", "str": "TEXT", "switch": "true|false"}
_USAGE = "qwen3-sft train [--config RECIPE.yaml] [--option value ...]"
_BEGIN = (
    "An option of the command line wins over the recipe's. A recipe may also say `planned_for: "
    "8xH200`, which `qwen3-sft plan` then takes."
)
_END = "--help_all lists rarer options of transformers' TrainingArguments, too."


def help_for(argv: Sequence[str]) -> str | None:
    """Return the help that a command line asks for, None if it asks for none."""
    if "--help_all" in argv or "--help-all" in argv:
        return help_text(is_whole=True)
    return help_text() if {"-h", "--help"} & set(argv) else None


def help_text(*, is_whole: bool = False) -> str:
    """Return the description of the options; without `is_whole` of those that most runs need."""
    low, high = _WIDTHS
    width = min(max(shutil.get_terminal_size((high, 24)).columns, low), high)
    parser = argparse.ArgumentParser(
        usage=_USAGE, description=_BEGIN, epilog=None if is_whole else _END, add_help=False,
        formatter_class=partial(argparse.HelpFormatter, max_help_position=34, width=width),
    )  # fmt: skip
    for group in GROUPS:
        section = parser.add_argument_group(group.title)
        for name, words in group.names(is_whole=is_whole).items():
            option = listing()[name]
            section.add_argument(
                f"--{name}", metavar=_VALUES[option.kind] + (" ..." if option.nargs == "+" else ""),
                help=_described(name, words or option.help, option).replace("%", "%%"),
            )  # fmt: skip
    return parser.format_help()


def _described(name: str, words: str, option: Listed) -> str:
    rule = RULES.get(name)
    choices = option.choices or (rule.names if rule else ())
    parts = [f"one of {', '.join(choices)}"] if choices else []
    if "default" not in words:
        parts.append(f"default {_shown(option.default)}")
    return f"{words} ({'; '.join(parts)})" if parts else words


def _shown(default: Any) -> str:
    match default:
        case None | "" | []:
            return "none"
        case bool():
            return str(default).lower()
        case list():
            return " ".join(default)
        case float():
            return f"{default:g}"
    return str(default)

"""What commands take that look at a recipe: its path first, options of a run, and a format."""

from __future__ import annotations

import argparse


def recipe_parser(command: str) -> argparse.ArgumentParser:
    """Return a parser of the options that are the command's own, not those of a run.

    Args:
        command: such as `plan`.
    """
    parser = argparse.ArgumentParser(
        f"qwen3-sft {command}", f"qwen3-sft {command} [RECIPE] [options]", add_help=False,
        allow_abbrev=False, epilog="and options of a run (train --help), which win over the recipe",
    )  # fmt: skip
    parser.add_argument("-h", "--help", action="store_true", help="this text")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    return parser


def with_config(words: list[str]) -> list[str]:
    """Return words of a run, a recipe that stands first as its `--config`.

    argparse would take the value of any option for it.
    """
    return ["--config", *words] if words and not words[0].startswith("-") else words

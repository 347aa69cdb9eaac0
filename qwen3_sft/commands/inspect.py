"""Show what the model would be trained on: samples with their labels, and what is lost.

Rows take the same way as in training, and what training refuses in them is refused here. Nothing
is cached and nothing is refused for its share of dropped rows: this is the place to look when
`prepare` refuses. Only as many rows are read as the samples asked for need.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from qwen3_sft.errors import DONE, UsageError
from qwen3_sft.options.command_line import read_options


def command(argv: list[str], *, color: bool = False) -> tuple[Iterator[str], int]:
    """Return the lines to print, and the exit code.

    Args:
        argv: `[-n N] [--format text|json] [--option value ...]`.
        color: mark trained text in green.

    Raises:
        UsageError: an option is wrong.
        ModelError: the model has no tokenizer that this project knows.
        DataError: as `inspect`.
    """
    epilog = "and options of a run (train --help); --dataset and --model_name_or_path are needed"
    parser = argparse.ArgumentParser("qwen3-sft data inspect", add_help=False, epilog=epilog)
    parser.add_argument("-h", "--help", action="store_true", help="this text")
    parser.add_argument("-n", type=int, default=5, help="samples to show; 5")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    own, rest = parser.parse_known_args(argv)
    if own.help:
        return iter([parser.format_help()]), DONE
    if own.n < 1:
        raise UsageError(f"-n {own.n}: must be at least 1")
    read_options(rest)  # before the imports
    from qwen3_sft.commands.shown_samples import inspect
    from qwen3_sft.demo.build import resolve_demo
    from qwen3_sft.model.loading import load_tokenizer, resolve_tokenizer
    from qwen3_sft.options.recipe import parse_options

    options = parse_options(rest)
    model, data = resolve_demo(options.model.model_name_or_path, options.data)
    tokenizer = load_tokenizer(resolve_tokenizer(model, options.model.model_revision))
    return inspect(data, tokenizer, own.n, own.format, color=color), DONE

"""`qwen3-sft data prepare`: fill the token cache of a recipe, before a GPU is paid for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from qwen3_sft.commands.recipe_argument import recipe_parser, with_config
from qwen3_sft.errors import DONE
from qwen3_sft.options.command_line import read_options

if TYPE_CHECKING:
    from qwen3_sft.data.token_store import TokenDataset
    from qwen3_sft.options.data_args import DataArguments


def command(argv: list[str], *, color: bool = False) -> tuple[Iterator[str], int]:
    """Tokenise; return the lines to print, and the exit code.

    Nothing is written but the cache (`--data_cache_dir`), and the demo if that is asked for. A run
    of the same recipe and version finds it wherever it sees the same files under the same names.

    Args:
        argv: `RECIPE [--format text|json] [--option value ...]`.
        color: nothing here is coloured.

    Raises:
        UsageError: an option is wrong.
        ModelError: the model has no tokenizer that this project knows.
        DataError: a source or a row cannot be trained on, or too many are dropped.
    """
    parser = recipe_parser("data prepare")
    own, rest = parser.parse_known_args(argv)
    if own.help:
        return iter([parser.format_help()]), DONE
    rest = with_config(rest)
    read_options(rest)  # before the imports
    return iter(_prepared(rest, own.format)), DONE


def _prepared(argv: list[str], fmt: str) -> list[str]:
    from qwen3_sft.data.readers import check_sources
    from qwen3_sft.data.tokens import prepare_tokens
    from qwen3_sft.demo.build import resolve_demo
    from qwen3_sft.model.loading import load_tokenizer, resolve_tokenizer
    from qwen3_sft.options.recipe import parse_options
    from qwen3_sft.records.ownership import refuse_foreign_run
    from qwen3_sft.records.run_folder import RunFolder

    options = parse_options(argv)
    folder = RunFolder(options.output_dir)
    refuse_foreign_run(folder.path)  # where a demo is built
    check_sources(options.data)
    # As a run does, so that it finds what is made here.
    name, data = resolve_demo(options.model.model_name_or_path, options.data, folder.demo)
    tokenizer = load_tokenizer(resolve_tokenizer(name, options.model.model_revision))
    tokens = prepare_tokens(data, tokenizer, options.train.seed)
    named = {"dataset": tokens.train, "evaluation": tokens.eval}
    found = {name: part for name, part in named.items() if part is not None}
    if fmt == "json":
        return [json.dumps({name: part.report for name, part in found.items()})]
    return [_line(name, part, data) for name, part in found.items()]


def _line(name: str, tokens: TokenDataset, data: DataArguments) -> str:
    from qwen3_sft.packing.rows import PackedDataset

    rows = PackedDataset(tokens, data.max_length, packing=data.packing)
    return (
        f"{name}: {len(tokens):,} samples, {int(tokens.lengths.sum()):,} tokens in {len(rows):,} "
        f"rows of {data.max_length:,} ({rows.fill:.1%} full), in {tokens.folder}"
    )

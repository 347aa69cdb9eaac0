"""The console script `qwen3-sft`."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwen3_sft.logs import set_up_logging

USAGE = """usage: qwen3-sft COMMAND ...

  train [--config RECIPE] [--option value ...]   fine-tune; without options the embedded demo
  train --help                                   every option
  resume RUN [--option value ...]                go on with a run from its config.yaml
  resume RUN --verify                            prove that it could: repeat a recorded step
  plan RECIPE [--gpus 8xH200] [--format text|json] [--option value ...]
                                                 memory, verdict and expected speed, without a GPU
  data inspect --dataset F --model_name_or_path M [-n N] [--format text|json] [--option value ...]
                                                 samples with the trained text marked
  export CHECKPOINT FOLDER [--dtype DTYPE] [--trust_checkpoint true]
                                                 a checkpoint of a run as a hub model, verified
"""


def main(argv: list[str] | None = None) -> int:
    """Dispatch a command line; return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    match argv:
        case ["train", *rest]:
            from qwen3_sft.launch.launch import launch

            return launch(rest) if not {"-h", "--help"} & set(rest) else _train_help()
        case ["resume", *rest]:
            return _resume(rest)
        case ["plan", *rest]:
            return _plan(rest)
        case ["data", "inspect", *rest]:
            return _inspect(rest)
        case ["export", *rest]:
            return _export(rest)
        case [] | ["-h" | "--help", *_]:
            print(USAGE, end="")
            return 0 if argv else 2
    print(f"qwen3-sft: unknown command {' '.join(argv[:2])!r}\n{USAGE}", end="", file=sys.stderr)
    return 2


def _train_help() -> int:
    set_up_logging()
    from qwen3_sft.options.recipe import help_text

    print(help_text(), end="")
    return 0


def _resume(argv: list[str]) -> int:
    """Go on with a run, or prove that one could."""
    from qwen3_sft.checkpoints.manifest import CheckpointError
    from qwen3_sft.commands.resume import resume_command
    from qwen3_sft.options.recipe import UsageError

    try:
        return resume_command(argv)
    except (UsageError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def _plan(argv: list[str]) -> int:
    """Print the plan; what libraries print goes to standard error."""
    output = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        set_up_logging(sys.stderr)
        from qwen3_sft.commands.plan import plan_command
        from qwen3_sft.options.recipe import UsageError

        try:
            lines, exit_code = plan_command(argv)
        except UsageError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    for line in lines:
        print(line, file=output)
    return exit_code


def _inspect(argv: list[str]) -> int:
    """Print samples as text or as JSON lines; what libraries print goes to standard error."""
    parser = argparse.ArgumentParser(prog="qwen3-sft data inspect", add_help=False)
    parser.add_argument("-n", type=int, default=5)
    parser.add_argument("--format", choices=("text", "json"), default="text")
    own, rest = parser.parse_known_args(argv)
    output = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        set_up_logging(sys.stderr)
        from qwen3_sft.chat.samples import DataError
        from qwen3_sft.model.loading import ModelError
        from qwen3_sft.options.recipe import UsageError

        try:
            for line in _inspected(rest, own.n, own.format, color=output.isatty()):
                print(line, file=output)
        except (UsageError, DataError, ModelError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    return 0


def _inspected(argv: list[str], n: int, fmt: Any, *, color: bool) -> Iterator[str]:
    from qwen3_sft.commands.inspect import inspect
    from qwen3_sft.demo.build import resolve_demo
    from qwen3_sft.model.loading import load_tokenizer, resolve_tokenizer
    from qwen3_sft.options.recipe import parse_options

    options = parse_options(argv)
    model, data = resolve_demo(options.model.model_name_or_path, options.data)
    tokenizer = load_tokenizer(resolve_tokenizer(model, options.model.model_revision))
    yield from inspect(data, tokenizer, n, fmt, color=color)


def _export(argv: list[str]) -> int:
    """Write a run's checkpoint as a hub model."""
    set_up_logging()
    parser = argparse.ArgumentParser(prog="qwen3-sft export")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument(
        "--trust_checkpoint", nargs="?", const="true", default="false", choices=("true", "false"),
        help="load it although that might run code; only if you know who wrote it",
    )  # fmt: skip
    own = parser.parse_args(argv)

    import torch

    from qwen3_sft.checkpoints.manifest import CheckpointError
    from qwen3_sft.checkpoints.whole import load_checkpoint
    from qwen3_sft.export.check import ExportError
    from qwen3_sft.export.export import export_model
    from qwen3_sft.model.loading import ModelError

    try:
        model = load_checkpoint(own.checkpoint, trusted=own.trust_checkpoint == "true")
        export_model(model, own.checkpoint, own.folder, getattr(torch, own.dtype))
    except (CheckpointError, ModelError, ExportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ModelError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The console script `qwen3-sft`."""

from __future__ import annotations

import contextlib
import sys
from importlib import import_module

from qwen3_sft.errors import DONE, MISTAKE, exit_code_of, unless_stopped
from qwen3_sft.logs import set_up_logging

USAGE = """usage: qwen3-sft COMMAND ...

  train [--config RECIPE] [--option value ...]   fine-tune; without options the embedded demo
  train --help                                   its options; --help_all: the rare ones, too
  resume RUN [--option value ...]                go on with a run from its config.yaml
  resume RUN --verify                            prove that it could: repeat a recorded step
  plan RECIPE [--gpus 8xH200] [--format text|json] [--option value ...]
                                                 memory, verdict and expected speed, without a GPU
  data inspect --dataset F --model_name_or_path M [-n N] [--format text|json] [--option value ...]
                                                 samples with the trained text marked
  data prepare RECIPE [--format text|json] [--option value ...]
                                                 tokenise beforehand, without a GPU
  export CHECKPOINT FOLDER [--dtype DTYPE] [--trust_checkpoint true]
                                                 a checkpoint of a run as a hub model, verified
"""


def main(argv: list[str] | None = None) -> int:
    """Dispatch a command line; return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    return unless_stopped(lambda: exit_code_of(lambda: _dispatch(argv), _report), _report)


def _dispatch(argv: list[str]) -> int:
    match argv:
        case ["train", *rest]:
            return _train(rest)
        case ["resume", *rest]:
            from qwen3_sft.commands.resume import resume_command

            return resume_command(rest)
        case ["plan", *rest]:
            return _print("qwen3_sft.commands.plan", rest)
        case ["data", "inspect", *rest]:
            return _print("qwen3_sft.commands.inspect", rest)
        case ["data", "prepare", *rest]:
            return _print("qwen3_sft.commands.prepare", rest)
        case ["export", *rest]:
            from qwen3_sft.commands.export import export_command

            return export_command(rest)
        case [] | ["-h" | "--help", *_]:
            print(USAGE, end="")
            return DONE if argv else MISTAKE
    print(f"qwen3-sft: unknown command {' '.join(argv[:2])!r}\n{USAGE}", end="", file=sys.stderr)
    return MISTAKE


def _train(argv: list[str]) -> int:
    from qwen3_sft.options.help_text import help_for

    if text := help_for(argv):
        print(text, end="")
        return DONE
    from qwen3_sft.launch.launch import launch

    return launch(argv)


def _print(module: str, argv: list[str]) -> int:
    """Print the lines of a command; what libraries print goes to standard error."""
    output = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        set_up_logging(sys.stderr)
        lines, exit_code = import_module(module).command(argv, color=output.isatty())
        for line in lines:
            print(line, file=output)
    return exit_code


def _report(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())

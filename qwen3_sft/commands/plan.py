"""`qwen3-sft plan`: memory, verdict and speed of a recipe, on GPUs that need not be here."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

from qwen3_sft.commands.recipe_argument import recipe_parser, with_config
from qwen3_sft.errors import DOES_NOT_FIT, DONE, UsageError
from qwen3_sft.options.command_line import Given, read_options
from qwen3_sft.options.recipe_file import PLANNED_FOR

if TYPE_CHECKING:
    from qwen3_sft.decisions import Decisions
    from qwen3_sft.plan.plan import Gpu

_PER_NODE = 8


def command(argv: list[str], *, color: bool = False) -> tuple[Iterator[str], int]:
    """Return the lines to print and the exit code: 3 if the run does not fit.

    Args:
        argv: `RECIPE [--gpus 1xH200] [--format text|json] [--option value ...]`.
        color: nothing here is coloured.

    Raises:
        UsageError: an option, the recipe or the GPUs are wrong.
    """
    parser = recipe_parser("plan")
    parser.add_argument(
        "--gpus",
        help=f"such as 8xH200; by default those of the recipe ({PLANNED_FOR}: 8xH200), else "
        "those that are here",
    )
    own, rest = parser.parse_known_args(argv)
    if own.help:
        return iter([parser.format_help()]), DONE
    rest = with_config(rest)
    given = read_options(rest, needs_data=False)
    return _planned(rest, *_gpus(own.gpus, given), own.format)


def _planned(rest: list[str], count: int, gpu: Gpu, fmt: str) -> tuple[Iterator[str], int]:
    from qwen3_sft.decisions import Machine, decide
    from qwen3_sft.launch.choice import choose, launch_environment, planned_model
    from qwen3_sft.options.recipe import parse_options

    nodes = -(-count // _PER_NODE)
    choice = choose(
        rest, gpus_per_node=count // nodes, nodes=nodes, gpu_memory_gib=gpu.memory_gib,
        environment=os.environ, needs_data=False,
    )  # fmt: skip
    environment = {**launch_environment(choice), "LOCAL_WORLD_SIZE": str(count // nodes)}
    options = parse_options([*rest, *choice.run_flags], needs_data=False)
    model, assumption = planned_model(options)
    decisions = decide(options, model, Machine(gpu), environment)
    exit_code = DOES_NOT_FIT if decisions.plan.fits is False else DONE
    if fmt == "json":
        return iter([_json(decisions)]), exit_code
    first = f"{assumption}{count} x {gpu.name}: {choice.reason}"
    return chain([first], decisions.lines(), filter(None, [decisions.advice_line])), exit_code


def _gpus(words: str | None, given: Given) -> tuple[int, Gpu]:
    """Read `8xH200`; by default what the recipe was made for, else this machine's GPUs."""
    where = f"--gpus {words}"
    if words is None and given.planned_for is not None:
        words, where = given.planned_for, f"{given.recipe}: {PLANNED_FOR}: {given.planned_for}"
    if words is None:
        return _gpus_here()
    found = re.fullmatch(r"(?:(\d+)\s*[xX]\s*)?(.+)", words.strip())
    count = int(found[1] or 1) if found else 0
    if found is None or count < 1:
        raise UsageError(f"{where}: write it as 8xH200")
    if count > _PER_NODE and count % _PER_NODE:
        raise UsageError(f"{where}: several nodes have {_PER_NODE} GPUs each")
    from qwen3_sft.plan.plan import Gpu

    return count, Gpu.named(found[2], where)


def _gpus_here() -> tuple[int, Gpu]:
    import torch

    from qwen3_sft.hardware import device_names
    from qwen3_sft.plan.plan import Gpu

    if count := torch.cuda.device_count():
        return count, Gpu.here()
    raise UsageError(
        "no GPU is here and the recipe names none: give them, such as --gpus 8xH200; known are "
        f"{', '.join(device_names())}"
    )


def _json(decisions: Decisions) -> str:
    from qwen3_sft.plan.weights import GIB

    plan, advice = decisions.plan, decisions.advice
    parts = {name: size / GIB for name, size in plan.components().items()}
    if plan.gpu is not None:
        parts["temporaries"] += plan.gpu.reserve_gib
    report: dict[str, Any] = {f"{name}_gib": round(size, 3) for name, size in parts.items()}
    report |= {
        "total_gib": round(plan.total_gib, 3),
        "device_gib": None if plan.gpu is None else round(plan.gpu.memory_gib, 3),
        "fits": plan.fits,
        "tokens_per_micro_batch": plan.tokens_that_fit,
        "tokens_per_second_per_gpu": plan.expected and round(plan.expected.tokens_per_second),
        "engine": str(plan.engine),
        "processes": plan.processes,
        "layers": dict(plan.layers),
        "nearest": advice and advice[0],
    }
    return json.dumps(report)

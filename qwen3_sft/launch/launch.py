"""`qwen3-sft train`: choose the accelerate config and start the processes."""

from __future__ import annotations

import json
import logging
import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from qwen3_sft.errors import BY_SIGNAL, STOPPED, exit_code_of
from qwen3_sft.launch.accelerate_environment import single_process_environment
from qwen3_sft.launch.agent import WORKER, Agent, reported_code
from qwen3_sft.launch.choice import (
    CONFIG,
    SINGLE,
    Choice,
    choose,
    launch_environment,
    read_launch_file,
)
from qwen3_sft.launch.port import port_flags
from qwen3_sft.launch.quiet_agent import quiet
from qwen3_sft.logs import set_up_logging
from qwen3_sft.options.command_line import read_options
from qwen3_sft.options.variables import check_launcher_variables, is_dry_run
from qwen3_sft.records.secret_options import masked

logger = logging.getLogger(__name__)

# What is trained without any option.
DEMO = ["--config", f"{CONFIG}/recipe/demo.yaml"]
# NVIDIA, NVIDIA in WSL, AMD. Without such a file no GPU is here, and torch need not be asked.
GPU_FILES = ("nvidia[0-9]*", "dxg", "kfd")
_POLL_S = 0.5


def launch(argv: list[str]) -> int:
    """Run `accelerate launch CONFIG -m qwen3_sft.train ARGV`; return the run's own exit code.

    Options are read first, so that a mistake in them needs no import of torch. A process alone is
    started as accelerate would start it, without the seconds that its launcher takes to import.

    SIGTERM and SIGUSR1 have a run that trains save and end: 75. At other times they end it, and
    SIGINT does always: 128 and the signal's number.

    Environment:
        ACCELERATE_CONFIG: the launch file; by default chosen by GPUs and memory plan.
        DRY_RUN: 1 prints the command, the patches and the memory plan instead.
    """
    set_up_logging()
    return exit_code_of(lambda: _launch(argv or DEMO), logger.error)


def _launch(argv: list[str]) -> int:
    is_dry = is_dry_run(os.environ)
    check_launcher_variables(os.environ)
    read_options(argv)
    gpus, memory = _machine()
    choice = choose(argv, gpus_per_node=gpus, gpu_memory_gib=memory, environment=os.environ)
    port = [] if is_alone(choice) else port_flags(read_launch_file(choice.config), os.environ)
    command = launch_command(argv, replace(choice, accelerate_flags=choice.accelerate_flags + port))
    logger.info("launch: %s (%s)", choice.config, choice.reason)
    if is_dry:
        logger.info("command: %s", shlex.join(masked(command)))
        return show_plan([*argv, *choice.run_flags], launch_environment(choice))
    prepare_deepspeed(argv, choice)
    with tempfile.TemporaryDirectory() as folder:
        exit_file = Path(folder) / "exit_code"
        environment = {**os.environ, "QWEN3_SFT_EXIT_FILE": str(exit_file)}
        if is_alone(choice):
            environment = single_process_environment(environment)
        else:
            command = quiet(command)
        with Agent(command, environment) as agent:
            while agent.poll() is None:
                agent.has_workers()
                agent.wait(_POLL_S)
        code = agent.exit_code(reported_code(exit_file))
        if code == BY_SIGNAL + signal.SIGINT:  # of which the workers say nothing
            logger.info(STOPPED)
        return code


def launch_command(argv: list[str], choice: Choice) -> list[str]:
    """Return the command that starts a run with these options."""
    if is_alone(choice):
        return [sys.executable, *WORKER, *argv, *choice.run_flags]
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    config = ["--config_file", str(choice.config), *choice.accelerate_flags]
    return [*accelerate, *config, *WORKER, *argv, *choice.run_flags]


def is_alone(choice: Choice) -> bool:
    """Whether a run is one process, of which accelerate's launcher has nothing to say."""
    return choice.config.resolve() == SINGLE.resolve()


def _machine() -> tuple[int, float | None]:
    """Return the number of GPUs and the memory of one in GiB; None where it decides nothing."""
    if not any(file for pattern in GPU_FILES for file in Path("/dev").glob(pattern)):
        return 0, None

    import torch

    gpus = torch.cuda.device_count()
    if gpus <= 1:
        return gpus, None
    return gpus, torch.cuda.get_device_properties(0).total_memory / 2**30


def show_plan(argv: list[str], environment: Mapping[str, str]) -> int:
    """Print what a run would do; return its exit code.

    Args:
        argv: options of the run.
        environment: what its processes would find.
    """
    from qwen3_sft.train import main

    with _environment(environment):
        return main([*argv, "--dry_run", "true"])


def prepare_deepspeed(argv: list[str], choice: Choice) -> None:
    """Do once, before any process starts, what would stall them or be found out after minutes.

    Raises:
        UsageError: DeepSpeed or a compiler is missing, a build was cut off, or the units of ZeRO-3
            do not suit the model.
    """
    flags = choice.accelerate_flags
    if "--deepspeed_config_file" not in flags:
        return
    from qwen3_sft.distributed.engine import require_deepspeed
    from qwen3_sft.launch.choice import planned_model
    from qwen3_sft.launch.cpu_adam import prebuild_cpu_adam, refuse_stale_locks
    from qwen3_sft.options.recipe import parse_options
    from qwen3_sft.plan.zero3_units import check_zero3, describe

    require_deepspeed()
    refuse_stale_locks()
    file = Path(flags[flags.index("--deepspeed_config_file") + 1])
    config = json.loads(file.read_text(encoding="utf-8"))
    if config["zero_optimization"]["stage"] == 3:
        model, assumption = planned_model(parse_options(argv))
        logger.info("%s%s", assumption, describe(check_zero3(model, config)))
    prebuild_cpu_adam(config)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)

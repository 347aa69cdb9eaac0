"""`qwen3-sft train`: choose the accelerate config and start the processes."""

from __future__ import annotations

import logging
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import qwen3_sft
from qwen3_sft.logs import set_up_logging

logger = logging.getLogger(__name__)

CONFIG = Path(qwen3_sft.__file__).parent.parent / "config"


def launch(argv: list[str]) -> int:
    """Run `accelerate launch CONFIG -m qwen3_sft.train ARGV`; return the run's own exit code.

    Environment:
        ACCELERATE_CONFIG: the launch file; by default chosen by the number of GPUs.
        DRY_RUN: 1 prints the command, the patches and the memory plan instead.
    """
    set_up_logging()
    if not argv:
        argv = ["--config", str(CONFIG / "recipe" / "demo.yaml")]
    command = launch_command(argv)
    if os.environ.get("DRY_RUN") == "1":
        logger.info("command: %s", shlex.join(command))
        from qwen3_sft.train import main

        return main([*argv, "--dry_run", "true"])
    with tempfile.TemporaryDirectory() as folder:
        exit_file = Path(folder) / "exit_code"
        environment = {**os.environ, "QWEN3_SFT_EXIT_FILE": str(exit_file)}
        code = subprocess.run(command, env=environment, check=False).returncode
        return int(exit_file.read_text(encoding="utf-8")) if exit_file.is_file() else code


def launch_command(argv: list[str]) -> list[str]:
    """Return the accelerate command for these options."""
    if config := os.environ.get("ACCELERATE_CONFIG"):
        choice = ["--config_file", config]
    else:
        import torch

        gpus = torch.cuda.device_count()
        name = "ddp.json" if gpus > 1 else "single.json"
        choice = ["--config_file", str(CONFIG / name)]
        choice += ["--num_processes", str(gpus)] if gpus > 1 else []
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    return [*accelerate, *choice, "-m", "qwen3_sft.train", *argv]

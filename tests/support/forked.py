"""Processes forked from a server that has everything imported: a start costs 0.1 s, not ten.

One server per test process, started by the first use; `commands.py` starts real commands.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.support.commands import free_port

PRINTED = ("out", "err")
# Every run imports DeepSpeed, every run with ZeRO the last one and torch's compiler with it.
_PRELOAD = ("qwen3_sft.run", "tests.support.faults", "deepspeed.runtime.zero.stage_1_and_2")


def start(
    function: Callable[..., Any], *args: object, out: Path, err: Path, environment: dict[str, str]
) -> BaseProcess:
    """Start `sys.exit(function(*args))`.

    Args:
        function: of a module that can be imported.
        *args: that can be pickled.
        out: file that its standard output is appended to.
        err: the same of its errors.
        environment: all its variables.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*_PRELOAD])
    process = context.Process(target=_run, args=(function, args, out, err, environment))
    process.start()
    return process


def _run(
    function: Callable[..., Any], args: tuple, out: Path, err: Path, environment: dict[str, str]
) -> None:
    for file, number in ((out, 1), (err, 2)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    gc.freeze()  # collections need not look at what is imported
    import torch

    torch.set_num_threads(1)
    sys.exit(function(*args))


def run_ranks(
    number: int,
    function: Callable[..., Any],
    *args: object,
    folder: Path,
    timeout_s: float = 600,
    **environment: str,
) -> subprocess.CompletedProcess:
    """Run `function(*args)` on every rank, with the variables that torchrun sets; never raises.

    Args:
        number: of ranks; one has no such variables.
        function: of a module that can be imported; what it returns is the exit code.
        *args: that can be pickled.
        folder: a new one, for what they print.
        timeout_s: after it, and when one has failed, the others are killed.
        **environment: further variables.
    """
    ranks = start_ranks(number, function, *args, folder=folder, **environment)
    end = time.monotonic() + timeout_s
    while any(rank.exitcode is None for rank in ranks):
        if any(rank.exitcode for rank in ranks) or time.monotonic() > end:
            for rank in ranks:
                rank.kill()
        time.sleep(0.02)
    codes = [rank.exitcode or 0 for rank in ranks]
    printed = [(folder / name).read_text(errors="replace") for name in PRINTED]
    return subprocess.CompletedProcess(str(function), next(filter(None, codes), 0), *printed)


def start_ranks(
    number: int, function: Callable[..., Any], *args: object, folder: Path, **environment: str
) -> list[BaseProcess]:
    """Start what `run_ranks` runs; what they print goes to the files `PRINTED` of a new folder."""
    folder.mkdir(parents=True)
    out, err = (folder / name for name in PRINTED)
    out.touch()
    err.touch()
    port = free_port()
    return [
        start(function, *args, out=out, err=err,
              environment={**os.environ, **_torchrun(rank, number, port), **environment})
        for rank in range(number)
    ]  # fmt: skip


def _torchrun(rank: int, number: int, port: int) -> dict[str, str]:
    if number == 1:
        return {}
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number),
        "LOCAL_WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip

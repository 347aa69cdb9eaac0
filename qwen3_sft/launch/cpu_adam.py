"""Build DeepSpeed's CPU optimizer before a run needs it, and find builds that were cut off.

DeepSpeed compiles it at first use, for minutes and inside of the process group, whose timeout then
kills the ranks. A build that is killed leaves a file `lock` behind; every later run waits for its
removal, for ever and without a word.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import psutil

from qwen3_sft.distributed.engine import require_deepspeed
from qwen3_sft.errors import UsageError

logger = logging.getLogger(__name__)

# The extensions that DeepSpeed compiles by itself in a run of ours; the second on CPUs only.
EXTENSIONS = ("cpu_adam", "deepspeed_shm_comm")

_BUILD = "from deepspeed.ops.op_builder import CPUAdamBuilder; CPUAdamBuilder().load(verbose=False)"


def stale_build_locks(
    environment: Mapping[str, str] | None = None, names: Iterable[str] = EXTENSIONS
) -> list[Path]:
    """Return locks of extension builds that no process of this machine has open.

    torch keeps the file open while it builds, so that an open one is a build under way.

    Args:
        environment: TORCH_EXTENSIONS_DIR, HOME; the process's own by default.
        names: of the extensions.
    """
    there = {
        lock.resolve()
        for folder in _extension_folders(environment)
        for name in names
        if (lock := folder / name / "lock").is_file()
    }
    return sorted(there - _open_files()) if there else []


def refuse_stale_locks(environment: Mapping[str, str] | None = None) -> None:
    """Raise where a run would wait for ever.

    Raises:
        UsageError: naming the files and the command that removes them.
    """
    if locks := stale_build_locks(environment):
        files = " ".join(map(str, locks))
        raise UsageError(
            f"{files}: left by a build of a DeepSpeed extension that was killed, and every run "
            f"would wait for it silently; remove it: rm {files} (unless another machine that "
            "shares this folder is building now)"
        )


def prebuild_cpu_adam(
    config: Mapping[str, Any], environment: Mapping[str, str] | None = None
) -> bool:
    """Compile the CPU optimizer in a process of its own if the config needs it and it is not there.

    Args:
        config: DeepSpeed's.
        environment: TORCH_EXTENSIONS_DIR, HOME, CXX; the process's own by default.

    Returns:
        Whether a build was necessary.

    Raises:
        UsageError: a stale lock, something to build with is missing, or the build failed.
    """
    env = os.environ if environment is None else environment
    offload = config.get("zero_optimization", {}).get("offload_optimizer", {})
    if offload.get("device", "none") != "cpu":
        return False
    check_build_tools(env)
    refuse_stale_locks(env)
    if any((folder / "cpu_adam/cpu_adam.so").is_file() for folder in _extension_folders(env)):
        return False
    logger.info("compiling DeepSpeed's CPU optimizer, once; this takes some minutes")
    done = subprocess.run(
        [sys.executable, "-c", _BUILD], env=dict(env), check=False, capture_output=True, text=True
    )
    if done.returncode:
        raise UsageError(
            f"DeepSpeed's CPU optimizer does not compile:\n{done.stderr[-2000:]}\n"
            "Install what is missing, or launch with config/zero3.json, without offloading"
        )
    return True


def check_build_tools(environment: Mapping[str, str]) -> None:
    """Raise if there is nothing to compile an extension with.

    Raises:
        UsageError: naming what to install.
    """
    require_deepspeed()
    path = environment.get("PATH")
    # The wheel's program lies beside the interpreter, which need not be in PATH.
    here = str(Path(sys.executable).parent)
    for tool, install in (
        (environment.get("CXX", "c++"), "apt install g++"),
        ("ninja", "pip install ninja"),
    ):
        if not (shutil.which(tool, path=path) or shutil.which(tool, path=here)):
            raise UsageError(
                f"offloading the optimizer compiles DeepSpeed's CPU Adam, and {tool} is not "
                f"installed: {install}"
            )


def _extension_folders(environment: Mapping[str, str] | None) -> list[Path]:
    """Return the folders in which torch's `load` builds, for this Python and any accelerator."""
    env = os.environ if environment is None else environment
    if folder := env.get("TORCH_EXTENSIONS_DIR"):
        return [Path(folder)]
    cache = env.get("XDG_CACHE_HOME") or Path(env.get("HOME", "~")).expanduser() / ".cache"
    python = f"py{sys.version_info.major}{sys.version_info.minor}{sys.abiflags}"
    return sorted(Path(cache, "torch_extensions").glob(f"{python}_*"))


def _open_files() -> set[Path]:
    found: set[Path] = set()
    for process in psutil.process_iter():
        try:
            found |= {Path(file.path) for file in process.open_files()}
        except (psutil.AccessDenied, psutil.NoSuchProcess):
            continue
    return found

"""DeepSpeed's CPU optimizer is built before a run, and a lock that nobody holds is named."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from qwen3_sft.errors import UsageError
from qwen3_sft.launch.cpu_adam import (
    check_build_tools,
    prebuild_cpu_adam,
    refuse_stale_locks,
    stale_build_locks,
)
from tests.support.source_tree import ROOT


def shipped(name: str) -> dict:
    return json.loads((ROOT / f"config/deepspeed/{name}.json").read_text(encoding="utf-8"))


@pytest.fixture
def extensions(tmp_path) -> tuple[dict[str, str], Path]:
    folder = tmp_path / "cpu_adam"
    folder.mkdir()
    return {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path)}, folder


def test_a_lock_is_stale_when_nobody_has_it_open(extensions):
    environment, folder = extensions
    assert stale_build_locks(environment) == []
    lock = folder / "lock"
    # As torch's FileBaton does it, in this very process.
    handle = os.open(lock, os.O_CREAT | os.O_EXCL)
    assert stale_build_locks(environment) == []
    refuse_stale_locks(environment)
    os.close(handle)
    assert stale_build_locks(environment) == [lock]
    with pytest.raises(UsageError, match=f"rm {lock}"):
        refuse_stale_locks(environment)
    with pytest.raises(UsageError, match=f"rm {lock}"):
        prebuild_cpu_adam(shipped("zero3_offload"), environment)
    assert not prebuild_cpu_adam(shipped("zero3"), environment)


def test_lock_in_the_default_folder_is_found(tmp_path):
    python = f"py{sys.version_info.major}{sys.version_info.minor}{sys.abiflags}"
    folder = tmp_path / ".cache/torch_extensions" / f"{python}_cu130" / "cpu_adam"
    folder.mkdir(parents=True)
    (folder / "lock").touch()
    assert stale_build_locks({"HOME": str(tmp_path)}) == [folder / "lock"]


def test_nothing_is_built_twice_or_needlessly(extensions):
    environment, folder = extensions
    (folder / "cpu_adam.so").touch()
    assert not prebuild_cpu_adam(shipped("zero3_offload"), environment)
    assert not prebuild_cpu_adam(shipped("zero2"), environment)


def test_missing_build_tools_are_named(tmp_path):
    with pytest.raises(UsageError, match="no-such-compiler is not installed: apt install g"):
        check_build_tools({**os.environ, "CXX": "no-such-compiler"})


def test_a_build_that_fails_says_why(extensions, tmp_path):
    """With a compiler that only fails, which takes no minutes."""
    environment, _ = extensions
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho this compiler is broken >&2\nexit 1\n", encoding="utf-8")
    broken.chmod(0o755)
    environment |= {"CXX": str(broken), "DS_ACCELERATOR": "cpu"}
    with pytest.raises(UsageError, match="does not compile"):
        prebuild_cpu_adam(shipped("zero3_offload"), environment)

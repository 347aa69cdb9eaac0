"""Processes in which Triton compiles: the suite's own interprets kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.support.source_tree import ROOT


def run_compiling(*arguments: object, cache: Path, **environment: str) -> str:
    """Run `python ARGUMENTS` with binaries kept in `cache`; return what it prints."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    own = {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, env=inherited | own | environment,
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout

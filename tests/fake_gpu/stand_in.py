"""A CUDA device that is not there, for FakeTensors on it to pass through autograd's engine.

torch has to be one built for CPUs, and is told before it is imported, so that this holds for a
process of its own (`python -m tests.fake_gpu`).
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

SOURCE = Path(__file__).with_name("stand_in.cpp")


@contextmanager
def loaded(folder: Path) -> Iterator[None]:
    """Compile while the body runs, which imports no torch, then load."""
    torch = Path(find_spec("torch").origin).parent
    library = folder / "stand_in.so"
    compiler = subprocess.Popen(
        ["g++", "-std=c++20", "-O0", "-shared", "-fPIC", f"-I{torch / 'include'}", str(SOURCE),
         "-o", str(library), f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu",
         f"-Wl,-rpath,{torch / 'lib'}"],
    )  # fmt: skip
    yield
    assert compiler.wait() == 0, "g++ failed"
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)

"""Compile launches without running them: for a GPU that is not there, or all before the first step.

`compile_ahead` tells what a launch takes of a GPU (registers, spills, shared memory, tensor core
instructions), so that a CPU can guard a table of tiles. `compile_all` compiles many at once.

A driver that knows nothing but its target stands in for Triton's while a kernel is warmed up. The
signature, the specialisation of every argument and the key of the cache are therefore made by the
code that makes them at a real launch, and a cache filled here serves a GPU with the same wheel of
Triton.

The trap: whether an address or an integer is divisible by 16, and whether an integer is 1, belong
to the signature. Meta tensors count as aligned; integers must be those that will be launched.
"""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from monkey_patch.kernels.launch import Launch

# Threads, programs and KiB of shared memory at once on one multiprocessor, at most: CUDA C++
# programming guide, technical specifications per compute capability.
_MULTIPROCESSORS = {
    "sm_80": (2048, 32, 164),
    "sm_89": (1536, 24, 100),
    "sm_90": (2048, 32, 228),
    "sm_100": (2048, 32, 228),
    "sm_120": (1536, 24, 100),
}
TARGETS = tuple(_MULTIPROCESSORS)

_WARP = 32  # threads
_QUARTERS = 4  # of a multiprocessor, each with registers for its own warps
_QUARTER_REGISTERS = 16384
_REGISTERS_UNIT = 256  # a warp gets them in such portions
_SYSTEM_SHARED_BYTES = 1024  # per program, beside its own
_TENSOR_MEMORY_COLUMNS = 512

_USAGE = r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)"
_OPCODE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?(\w+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Resources:
    """What a compiled launch takes; instructions are counted as they stand in the machine code.

    Attributes:
        kernel: name of the launch.
        target: one of `TARGETS`.
        registers: per thread.
        spill_bytes: local memory per thread; Triton's kernels have no other use for it.
        spill_stores, spill_loads: instructions that write and read it.
        shared_bytes: per program.
        programs_per_sm: how many fit on one multiprocessor; 0 means that the launch fails.
        wgmma: tensor core instructions of Hopper.
        tcgen05: tensor core instructions of datacenter Blackwell.
        mma_sync: tensor core instructions of the other architectures, and the fallback on these.
        cp_async: asynchronous copies through pointers.
        tma_loads: loads through tensor descriptors.
        compile_s: time until the binary was there; next to nothing where a cache had it.
    """

    kernel: str
    target: str
    registers: int
    spill_bytes: int
    spill_stores: int
    spill_loads: int
    shared_bytes: int
    programs_per_sm: int
    wgmma: int
    tcgen05: int
    mma_sync: int
    cp_async: int
    tma_loads: int
    compile_s: float


def compile_ahead(launch: Launch, target: str) -> Resources:
    """Compile one launch for `target` and read its machine code; no GPU is needed.

    Args:
        launch: its tensors may be meta tensors.
        target: one of `TARGETS`.

    Raises:
        ValueError: unknown target.
        RuntimeError: Triton interprets in this process, or a tool of its wheel is missing.
        triton.TritonError: the kernel does not compile; a note names it.
    """
    start = time.perf_counter()
    compiled = compile_for(launch, target)
    seconds = time.perf_counter() - start
    registers, spill_bytes, opcodes = _machine_code(compiled)

    def count(pattern: str) -> int:
        return sum(number for name, number in opcodes.items() if re.fullmatch(pattern, name))

    return Resources(
        kernel=launch.name,
        target=target,
        registers=registers,
        spill_bytes=spill_bytes,
        spill_stores=opcodes["STL"],
        spill_loads=opcodes["LDL"],
        shared_bytes=compiled.metadata.shared,
        programs_per_sm=_programs_per_sm(compiled.metadata, registers, target),
        wgmma=count("[HQIB]GMMA"),
        tcgen05=count(r"UTC\w*MMA"),
        mma_sync=count("[HQIBDO]MMA"),
        cp_async=opcodes["LDGSTS"],
        tma_loads=opcodes["UTMALDG"],
        compile_s=seconds,
    )


def compile_for(launch: Launch, target: str) -> Any:
    """Return Triton's `CompiledKernel` of the launch for `target`, as `compile_ahead` uses it."""
    _check_compilable(launch)
    with _stand_in(target), _named(launch, target):
        _tool("ptxas_blackwell" if _capability(target) >= 100 else "ptxas")
        return _finished(_warm_up(launch))


def compile_all(
    launches: Sequence[Launch], target: str | None = None, workers: int | None = None
) -> float:
    """Compile many launches in parallel and return the seconds it took; nothing is run.

    Triton compiles a kernel when it is first launched, one after the other. Afterwards launches of
    these signatures find their binary, in this process and in others with the same cache folder.
    The compiler's front end holds Python's lock, the rest runs side by side.

    Args:
        launches: their tensors may be meta tensors; repetitions cost nothing.
        target: one of `TARGETS`, to fill the cache for another machine; None is the current device.
        workers: threads; None leaves it to `ThreadPoolExecutor`.

    Raises:
        ValueError: unknown target.
        RuntimeError: Triton interprets in this process, or there is no device.
        triton.TritonError: a kernel does not compile; a note names it, the others are compiled.
    """
    for launch in launches:
        _check_compilable(launch)
    start = time.perf_counter()
    with (
        _stand_in(target) if target else nullcontext(),
        ThreadPoolExecutor(workers) as pool,
        # A mode that does not ignore errors stays switched on after one, and hides whose it is.
        triton.AsyncCompileMode(pool, ignore_errors=True),
    ):
        kernels = [_warm_up(launch) for launch in launches]
    for launch, kernel in zip(launches, kernels, strict=True):
        with _named(launch, target or "this device"):
            _finished(kernel)
    return time.perf_counter() - start


def _warm_up(launch: Launch) -> Any:
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    return launch.kernel.warmup(grid=(launch.grid,), **launch.arguments, **options)


def _finished(kernel: Any) -> Any:
    """Return the compiled kernel, or raise what went wrong in another thread."""
    return kernel.result() if isinstance(kernel, triton.FutureKernel) else kernel


class _TargetOnly:
    """The part of a Triton driver that compiling asks for."""

    def __init__(self, target: str):
        self.target = target

    # A kernel keeps its binaries by device; under this name they stay apart from the real ones.
    def get_current_device(self) -> str:
        return self.target

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", _capability(self.target), _WARP)


_STAND_IN_LOCK = threading.RLock()


@contextmanager
def _stand_in(target: str) -> Iterator[None]:
    """Let Triton see a device of the kind `target`; other threads must not launch meanwhile."""
    if target not in _MULTIPROCESSORS:
        raise ValueError(f"unknown target {target!r}: choose from {', '.join(TARGETS)}")
    with _STAND_IN_LOCK:
        config: Any = driver
        before = config._active  # `active` would look for a GPU
        config.set_active(_TargetOnly(target))
        try:
            yield
        finally:
            config.set_active(before)


@contextmanager
def _named(launch: Launch, target: str) -> Iterator[None]:
    try:
        yield
    except (triton.TritonError, RuntimeError) as error:
        shape = {k: v for k, v in launch.arguments.items() if isinstance(v, int | str)}
        options = f"num_warps={launch.num_warps}, num_stages={launch.num_stages}"
        error.add_note(f"while compiling {launch.name} for {target}: {shape}, {options}")
        raise


def _check_compilable(launch: Launch) -> None:
    # Triton's own helpers tell how triton was imported, the kernel how it was decorated.
    kinds = {type(function).__name__ for function in (launch.kernel, tl.softmax)}
    if "InterpretedFunction" in kinds:
        raise RuntimeError(
            f"{launch.name} cannot be compiled: Triton was imported with TRITON_INTERPRET=1 and "
            "turned kernels into Python; use a process that starts without the variable"
        )
    if not isinstance(launch.kernel, triton.JITFunction):
        raise TypeError(f"{launch.name}: a triton.jit function is needed, not {launch.kernel!r}")


def _capability(target: str) -> int:
    return int(target.removeprefix("sm_"))


def _tool(name: str) -> str:
    try:
        return getattr(knobs.nvidia, name).path
    except RuntimeError as error:
        raise RuntimeError(
            f"this installation of Triton {triton.__version__} lacks {name.replace('_', '-')}: "
            f"reinstall its wheel, or name one of a CUDA toolkit in TRITON_{name.upper()}_PATH"
        ) from error


def _machine_code(compiled: Any) -> tuple[int, int, Counter[str]]:
    """Return registers, bytes of local memory per thread, and the opcodes with their numbers."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _output([_tool("cuobjdump"), "-res-usage", str(cubin)])
        # Without the analysis that names the targets of jumps: a fifth faster, the same opcodes.
        listing = _output([_tool("nvdisasm"), "-c", "--no-dataflow", str(cubin)])
    opcodes = Counter(_OPCODE.findall(listing))
    found = re.search(rf"Function {re.escape(compiled.metadata.name)}:\s+{_USAGE}", usage)
    if found is None or not opcodes["EXIT"]:
        raise RuntimeError(f"cannot read what cuobjdump and nvdisasm print:\n{usage}{listing:.500}")
    return int(found[1]), int(found[2]) + int(found[3]), opcodes


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with {done.returncode}: {done.stderr}")
    return done.stdout


def _programs_per_sm(metadata: Any, registers: int, target: str) -> int:
    """Apply the limits of threads, programs, registers, shared and tensor memory."""
    threads, programs, shared_kib = _MULTIPROCESSORS[target]
    warps = metadata.num_warps  # includes those that warp specialisation adds
    warp_registers = math.ceil(registers * _WARP / _REGISTERS_UNIT) * _REGISTERS_UNIT
    fits = [
        programs,
        threads // (warps * _WARP),
        _QUARTER_REGISTERS // warp_registers // math.ceil(warps / _QUARTERS),
        shared_kib * 1024 // (metadata.shared + _SYSTEM_SHARED_BYTES),
    ]
    if metadata.tmem_size:
        fits.append(_TENSOR_MEMORY_COLUMNS // metadata.tmem_size)
    return min(fits)

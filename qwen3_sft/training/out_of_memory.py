"""Out of memory, said so that one knows what ran out, who holds it and what to set.

torch's own message has the numbers and none of a run's options.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from qwen3_sft.errors import GpuMemoryError
from qwen3_sft.hardware import memory_stats
from qwen3_sft.plan.advice import MemorySettings, Stage, advice

_GIB = 2**30
_CPU_ALLOCATOR = "DefaultCPUAllocator: can't allocate memory"
# What another process or a context must hold, and the allocator waste, to be worth a line.
_MUCH = 2 * _GIB


@dataclass(frozen=True)
class GpuMemory:
    """Bytes of the current CUDA device at one moment.

    Attributes:
        allocated: in tensors of this process.
        reserved: held by its allocator.
        free: what the device has left.
        total: all of it.
    """

    allocated: int
    reserved: int
    free: int
    total: int

    @classmethod
    def now(cls) -> GpuMemory:
        """Measure."""
        free, total = torch.cuda.mem_get_info()
        return cls(torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), free, total)

    @property
    def others(self) -> int:
        """What other processes hold, and this one's CUDA context."""
        return max(0, self.total - self.free - self.reserved)

    def __str__(self) -> str:
        """Return the sentence for the error."""
        return (
            f"of {_gib(self.total)} this process holds {_gib(self.allocated)} in tensors "
            f"({_gib(self.reserved)} reserved), other processes and the CUDA context "
            f"{_gib(self.others)}, and {_gib(self.free)} are free"
        )


@contextmanager
def naming(
    stage: Stage | Callable[[], Stage],
    run: MemorySettings,
    *,
    so_far: Callable[[], str] = lambda: "nothing was trained yet",
    part: Callable[[], str | None] = lambda: None,
) -> Iterator[None]:
    """Turn a lack of memory inside into an error that names the stage and what to set.

    Args:
        stage: what is being done; a function is asked when it has failed.
        run: the options to advise on.
        so_far: what is lost and kept, asked when it has failed.
        part: a closer name of what was being done, asked when it has failed.

    Raises:
        GpuMemoryError: torch had no memory left, on a GPU or a CPU. Other errors pass.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        where: Stage = stage() if callable(stage) else stage
        closer = part()
        held, lines = (
            _on_gpu(run, where)
            if isinstance(error, torch.OutOfMemoryError)
            else (_on_host(run, where))
        )
        raise GpuMemoryError(
            f"memory ran out: {where}{f' ({closer})' if closer else ''}; {so_far()}. "
            f"{_wanted(error)}{held}. Set, the least costly first:\n"
            + "\n".join(f"  - {line}" for line in lines)
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Tell torch's lack of memory, on a GPU or a CPU, from every other error."""
    is_cpu = isinstance(error, RuntimeError) and _CPU_ALLOCATOR in str(error)
    return is_cpu or isinstance(error, torch.OutOfMemoryError)


def surroundings(memory: GpuMemory, environment: Mapping[str, str]) -> list[str]:
    """Return what helps without any option of the run: what is held outside of its tensors.

    Args:
        memory: when it ran out.
        environment: of the process.
    """
    found = []
    if memory.others > _MUCH:
        found.append(f"end other processes on this GPU (nvidia-smi): {_gib(memory.others)}")
    settings = "".join(environment.get(f"PYTORCH_{name}ALLOC_CONF", "") for name in ("CUDA_", ""))
    unused = memory.reserved - memory.allocated
    if unused > _MUCH and "expandable_segments:True" not in settings:
        found.append(
            "PYTORCH_ALLOC_CONF=expandable_segments:True in the environment "
            f"({_gib(unused)} are reserved in pieces that do not fit)"
        )
    return found


def _on_gpu(run: MemorySettings, stage: Stage) -> tuple[str, list[str]]:
    memory = GpuMemory.now()
    return str(memory), [*surroundings(memory, os.environ), *advice(run, stage)]


def _on_host(run: MemorySettings, stage: Stage) -> tuple[str, list[str]]:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    held = f"the host has {_gib(total)}, of which a container or ulimit may allow less"
    if not torch.cuda.is_available():
        resident = memory_stats().peak_allocated_gib * _GIB
        return f"{held}; this process had up to {_gib(resident)} of it", advice(run, stage)
    lines = ["--activation_offload false"] if run.offload else []
    lines += ["--dataloader_num_workers 0, --num_proc 1", "a host with more memory"]
    return f"{held}; the GPU's memory is another matter", lines


def _wanted(error: BaseException) -> str:
    """Return how much was asked for, `2.50 GiB were wanted; `, or nothing if torch does not say."""
    if found := re.search(r"[Tt]ried to allocate ([\d.]+ [KMG]iB)", str(error)):
        return f"{found[1]} were wanted; "
    if found := re.search(r"tried to allocate (\d+) bytes", str(error)):
        return f"{_gib(int(found[1]))} were wanted; "
    return ""


def _gib(size: float) -> str:
    return f"{size / _GIB:.2f} GiB"

"""What the device can do at most, and how much memory this process has used of it.

The peaks are dense (no 2:4 sparsity) matrix FLOP/s with FP32 accumulation at boost clock, from
NVIDIA's datasheets and white papers: the denominator of MFU. Datasheets print most tensor core
figures with sparsity; those are halved here and rounded down to whole TFLOP/s (989, not 989.5, as
everyone divides by). No device sustains its peak: 8192^3 bf16 products ran at 788 TFLOP/s on one
H200 (2026-11).

The trap is the name. H20, H200 and GH200 contain one another, a MIG slice carries its whole card's
name, laptop and export cards differ from their namesakes. So a name must match whole; any other
gives None, and with it no MFU, instead of a wrong one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

DType = Literal["bf16", "fp16", "tf32", "fp8", "fp32"]
DTYPES: tuple[DType, ...] = get_args(DType)

_GIB = 2**30


@dataclass(frozen=True)
class DeviceSpec:
    """One product.

    Attributes:
        name: the short name, which `find_device` takes too, in any case.
        driver_names: the names that `torch.cuda.get_device_name` returns for it.
        memory_mib: all memory as `nvidia-smi` prints it, in MiB. torch sees up to 2% less, and
            L40S, 4090 and 5090 have up to 7% less than the product's round number.
        tflops: peak dense TFLOP/s in the order of `DTYPES`; None where the hardware has no such
            unit. fp32 is the CUDA cores' rate.
        source: where the peaks come from.
    """

    name: str
    driver_names: tuple[str, ...]
    memory_mib: int
    tflops: tuple[float | None, float | None, float | None, float | None, float | None]
    source: str

    @property
    def memory_gib(self) -> float:
        """All memory of the device in GiB."""
        return self.memory_mib / 1024


_HOPPER_SXM = (989, 989, 494, 1979, 67)
_HOPPER_PCIE = (756, 756, 378, 1513, 51)
_HOPPER_NVL = (835, 835, 417, 1670, 60)
_AMPERE = (312, 312, 156, None, 19.5)

_H100 = "NVIDIA H100 datasheet (half of 1,979 | 1,513 | 1,671 BF16 for SXM | PCIe | NVL)"
_H200 = "NVIDIA H200 datasheet (half of 1,979 | 1,671 BF16 for SXM | NVL)"
_H800 = "H100's compute, NVLink cut to 400 GB/s (PCIe: Lenovo Press LP1814, 1,513 BF16 sparse)"
_H20 = "148 BF16 of the partners' H20 sheets; NVIDIA publishes no datasheet"
_A100 = "NVIDIA A100 datasheet (dense figures printed)"
_A800 = "A100's compute, NVLink cut to 400 GB/s: NVIDIA A800 datasheet"
_L40S = "NVIDIA L40S datasheet (dense figures printed)"
_ADA = "NVIDIA Ada architecture white paper v2.02, appendix A (FP32 accumulate)"
_RTX_BLACKWELL = "NVIDIA RTX Blackwell architecture white paper, table 3 (FP32 accumulate)"
_RTX_PRO = "NVIDIA RTX PRO Blackwell white paper, Workstation Edition (FP32 accumulate)"
_BLACKWELL = (
    "NVIDIA Blackwell datasheet, individual GPU (half of 5 | 4.5 PFLOPS BF16, GB200 | B200)"
)
_BLACKWELL_ULTRA = "NVIDIA HGX (B300: 1/16 of 36 PFLOPS BF16) and GB300 NVL72 (1/144 of 360) pages"

DEVICES: tuple[DeviceSpec, ...] = (
    DeviceSpec("H100 SXM", ("H100 80GB HBM3", "H100"), 81_559, _HOPPER_SXM, _H100),
    DeviceSpec("H100 PCIe", (), 81_559, _HOPPER_PCIE, _H100),
    DeviceSpec("H100 NVL", (), 95_830, _HOPPER_NVL, _H100),
    DeviceSpec("H200 SXM", ("H200",), 143_771, _HOPPER_SXM, _H200),
    DeviceSpec("H200 NVL", (), 143_771, _HOPPER_NVL, _H200),
    DeviceSpec("H800 SXM", ("H800",), 81_559, _HOPPER_SXM, _H800),
    DeviceSpec("H800 PCIe", (), 81_559, _HOPPER_PCIE, _H800),
    DeviceSpec("H20", (), 97_871, (148, 148, 74, 296, 44), _H20),
    DeviceSpec("H20-3e", (), 143_771, (148, 148, 74, 296, 44), _H20),
    DeviceSpec("A100 80GB", ("A100-SXM4-80GB", "A100 80GB PCIe"), 81_920, _AMPERE, _A100),
    DeviceSpec("A100 40GB", ("A100-SXM4-40GB", "A100-PCIE-40GB"), 40_960, _AMPERE, _A100),
    DeviceSpec("A800 80GB", ("A800-SXM4-80GB", "A800 80GB PCIe"), 81_920, _AMPERE, _A800),
    DeviceSpec("L40S", (), 46_068, (362.05, 362.05, 183, 733, 91.6), _L40S),
    DeviceSpec("RTX 4090", ("GeForce RTX 4090",), 24_564, (165.2, 165.2, 82.6, 330.3, 82.6), _ADA),
    DeviceSpec(
        "RTX 5090", ("GeForce RTX 5090",), 32_607, (209.5, 209.5, 104.8, 419, 104.8), _RTX_BLACKWELL
    ),
    # Its Server and Max-Q editions have other clocks.
    DeviceSpec(
        "RTX PRO 6000",
        ("RTX PRO 6000 Blackwell Workstation Edition",),
        97_887,
        (503.8, 503.8, 251.9, 1007.6, 126.0),
        _RTX_PRO,
    ),
    DeviceSpec("B200", (), 183_359, (2250, 2250, 1100, 4500, 75), _BLACKWELL),
    DeviceSpec("GB200", (), 189_471, (2500, 2500, 1250, 5000, 80), _BLACKWELL),
    DeviceSpec("B300", ("B300 SXM6 AC",), 275_040, (2250, 2250, 1125, 4500, 75), _BLACKWELL_ULTRA),
    DeviceSpec("GB300", (), 284_208, (2500, 2500, 1250, 5000, 80), _BLACKWELL_ULTRA),
)


@dataclass(frozen=True)
class DeviceInfo:
    """The devices this process computes on.

    Attributes:
        name: the driver's name of the current GPU, or the processor's.
        count: visible GPUs; 1 on CPU.
        memory_gib: all memory of one GPU; on CPU the machine's, whatever a container may allow.
        peak_flops: peak dense FLOP/s of one device by dtype; None where unknown, always on CPU.
    """

    name: str
    count: int
    memory_gib: float
    peak_flops: dict[DType, float | None]


@dataclass(frozen=True)
class MemoryStats:
    """Memory of the current device, or of this process where there is no GPU; all in GiB.

    Attributes:
        peak_allocated_gib: most memory in tensors since the last
            `torch.cuda.reset_peak_memory_stats`; on CPU the process's peak resident set, code and
            libraries included, since its start.
        peak_reserved_gib: most memory held by torch's allocator; on CPU the same peak again.
        total_gib: all memory of the device, or of the machine.
        allocation_retries: allocations that succeeded only after the cache was flushed; each one
            stalls the GPU, and a growing number means that memory is too tight. 0 on CPU.
    """

    peak_allocated_gib: float
    peak_reserved_gib: float
    total_gib: float
    allocation_retries: int


def device_names() -> list[str]:
    """Return the short names of all products."""
    return [device.name for device in DEVICES]


def find_device(device_name: str) -> DeviceSpec | None:
    """Return the product with this short or driver name, with or without `NVIDIA`, or None."""
    wanted = _normalized(device_name)
    for spec in DEVICES:
        if wanted in (_normalized(name) for name in (spec.name, *spec.driver_names)):
            return spec
    return None


def peak_flops(device_name: str, dtype: DType) -> float | None:
    """Return the peak dense FLOP/s of a device, None where it is unknown or has no such unit.

    Args:
        device_name: what `torch.cuda.get_device_name` returns, or a short name such as `H200`.
        dtype: the dtype of the matrix products.

    Raises:
        ValueError: for a dtype that is not one of `DTYPES`.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} has no column here; use one of {', '.join(DTYPES)}")
    spec = find_device(device_name)
    tflops = None if spec is None else spec.tflops[DTYPES.index(dtype)]
    return None if tflops is None else tflops * 1e12


def device_info() -> DeviceInfo:
    """Describe the current CUDA device, or the CPU where there is none."""
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        name, count, memory = properties.name, torch.cuda.device_count(), properties.total_memory
    else:
        name, count, memory = _cpu_name(), 1, _machine_memory_bytes()
    peaks = {dtype: peak_flops(name, dtype) for dtype in DTYPES}
    return DeviceInfo(name=name, count=count, memory_gib=memory / _GIB, peak_flops=peaks)


def memory_stats() -> MemoryStats:
    """Measure the memory of the current CUDA device, or of this process where there is none."""
    import torch

    if not torch.cuda.is_available():
        peak = _peak_resident_bytes() / _GIB
        return MemoryStats(peak, peak, _machine_memory_bytes() / _GIB, allocation_retries=0)
    stats = torch.cuda.memory_stats()
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    # Before the process's first allocation torch reports an empty dictionary.
    return MemoryStats(
        peak_allocated_gib=stats.get("allocated_bytes.all.peak", 0) / _GIB,
        peak_reserved_gib=stats.get("reserved_bytes.all.peak", 0) / _GIB,
        total_gib=total / _GIB,
        allocation_retries=stats.get("num_alloc_retries", 0),
    )


def _normalized(name: str) -> str:
    words = re.split(r"[\s_-]+", name.strip().casefold())
    return " ".join(words).removeprefix("nvidia ")


def _cpu_name() -> str:
    import platform

    # On Linux platform.processor() is empty or only the architecture.
    name = _proc_value("/proc/cpuinfo", "model name")
    return name or platform.processor() or platform.machine()


def _machine_memory_bytes() -> int:
    import os

    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _peak_resident_bytes() -> int:
    import resource

    # On Linux getrusage also reports the peak of the launcher that started this process: 611 MiB
    # for a child of 10 MiB (kernel 6.18). The kernel's own high-water mark starts afresh.
    peak = _proc_value("/proc/self/status", "VmHWM")
    if peak is not None:
        return int(peak.removesuffix("kB")) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, which has no /proc


def _proc_value(file: str, key: str) -> str | None:
    """The value of the first `key: value` line of a file under /proc, None where there is none."""
    from pathlib import Path

    path = Path(file)
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    found = re.search(rf"^{key}\s*:\s*(.+)$", text, flags=re.MULTILINE)
    return found[1].strip() if found else None

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen3_sft.hardware import (
    DEVICES,
    DTYPES,
    DeviceSpec,
    device_info,
    find_device,
    memory_stats,
    peak_flops,
)


def device(name: str) -> DeviceSpec:
    spec = find_device(name)
    assert spec is not None, name
    return spec


# What torch.cuda.get_device_name prints, and the bf16 TFLOP/s of the datasheet without sparsity.
@pytest.mark.parametrize(
    ("driver_name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA H800", 989),
        ("NVIDIA H800 PCIe", 756),
        ("NVIDIA H20", 148),
        ("NVIDIA H20-3e", 148),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("A100-SXM4-40GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A800-SXM4-80GB", 312),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 5090", 209.5),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 503.8),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA B300 SXM6 AC", 2250),
        ("NVIDIA GB300", 2500),
    ],
)
def test_bf16_peak_by_driver_name(driver_name, tflops):
    assert peak_flops(driver_name, "bf16") == pytest.approx(tflops * 1e12, rel=1e-12)


@pytest.mark.parametrize(
    "other_device",
    [
        "NVIDIA GH200 480GB",
        "NVIDIA L40",
        "NVIDIA L20X",
        "NVIDIA GB10",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA A100-SXM4-80GB MIG 3g.40gb",
        "NVIDIA A100-SXM-64GB",  # Leonardo's part, with 124 multiprocessors instead of 108
        "NVIDIA A100",  # 40 or 80 GB is not said
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 5090 Laptop GPU",
        "NVIDIA RTX PRO 6000 Blackwell Server Edition",
        "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition",
        "AMD Instinct MI300X",
        "Intel(R) Xeon(R) Platinum 8480C",
        "",
    ],
)
def test_devices_that_only_look_alike_have_no_peak(other_device):
    assert find_device(other_device) is None
    assert [peak_flops(other_device, dtype) for dtype in DTYPES] == [None] * len(DTYPES)


def test_short_names_are_found_in_any_case():
    assert find_device("h200") is find_device("NVIDIA H200") is find_device("h200_sxm")
    assert device("h100").name == "H100 SXM"
    assert find_device("rtx-4090") is find_device("NVIDIA GeForce RTX 4090")


def test_every_name_belongs_to_one_device():
    names = [name.casefold() for spec in DEVICES for name in {spec.name, *spec.driver_names}]
    assert len(names) == len(set(names))
    assert all(
        find_device(name) is spec for spec in DEVICES for name in (spec.name, *spec.driver_names)
    )


@pytest.mark.parametrize("spec", DEVICES, ids=lambda spec: spec.name)
def test_rates_scale_as_the_tensor_cores_do(spec):
    """A figure with sparsity slipped in, or with FP16 accumulation, breaks one of these ratios."""
    bf16, fp16, tf32, fp8, fp32 = spec.tflops
    assert bf16 == fp16
    assert bf16 / tf32 == pytest.approx(2, rel=0.025)
    if fp8 is not None:
        assert fp8 / bf16 == pytest.approx(2, rel=0.025)
    assert fp32 <= tf32


# Multiprocessors, dense BF16 FLOP per clock of one (white papers), tensor boost clock in GHz.
@pytest.mark.parametrize(
    ("name", "multiprocessors", "flop_per_clock", "clock"),
    [
        ("A100 80GB", 108, 2048, 1.41),
        ("H100 SXM", 132, 4096, 1.83),
        ("H100 PCIe", 114, 4096, 1.62),
        ("RTX 4090", 128, 512, 2.52),
        ("RTX 5090", 170, 512, 2.407),
    ],
)
def test_bf16_peak_follows_from_the_chip(name, multiprocessors, flop_per_clock, clock):
    from_chip = multiprocessors * flop_per_clock * clock * 1e9
    assert peak_flops(name, "bf16") == pytest.approx(from_chip, rel=1e-3)


def test_a100_has_no_fp8():
    assert peak_flops("NVIDIA A100-SXM4-80GB", "fp8") is None
    assert peak_flops("NVIDIA A100-SXM4-80GB", "tf32") == 156e12


def test_unknown_dtype_is_an_error_that_names_the_choices():
    typo: Any = "bfloat16"
    with pytest.raises(ValueError, match=r"dtype='bfloat16'.*bf16, fp16, tf32, fp8, fp32"):
        peak_flops("NVIDIA H200", typo)


@pytest.mark.parametrize(
    ("name", "product_gb"),
    [("H100", 80), ("H200", 141), ("A100 40GB", 40), ("L40S", 48), ("RTX 5090", 32), ("B200", 180)],
)
def test_memory_is_just_below_the_products_round_number(name, product_gb):
    assert 0.93 * product_gb < device(name).memory_gib <= product_gb


@pytest.mark.skipif(torch.cuda.is_available(), reason="describes a machine without a GPU")
def test_cpu_is_described_without_a_peak():
    info = device_info()
    assert info.name
    assert info.count == 1
    assert set(info.peak_flops) == set(DTYPES)
    assert set(info.peak_flops.values()) == {None}
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        total_kib = int(meminfo.read_text().split()[1])
        assert info.memory_gib == pytest.approx(total_kib / 2**20, rel=1e-3)


# The launcher's own memory must not show in the process that it starts.
_LAUNCHER = """
import subprocess, sys
held = bytearray(b"x") * (256 * 2**20)
subprocess.run([sys.executable, "-c", sys.argv[1]], check=True)
"""
_GROW = """
from qwen3_sft.hardware import _peak_resident_bytes
peaks = [_peak_resident_bytes()]
block = bytearray(b"x") * (64 * 2**20)
peaks.append(_peak_resident_bytes())
del block
peaks.append(_peak_resident_bytes())
print(*peaks)
"""


def test_peak_resident_memory_is_the_process_own_and_stays():
    command = [sys.executable, "-c", _LAUNCHER, _GROW]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    start, grown, end = (int(peak) / 2**20 for peak in run.stdout.split())
    assert 0 < start < 128
    assert grown - start == pytest.approx(64, abs=4)
    assert end == pytest.approx(grown, abs=4)  # the kernel sums per-CPU counters now and then


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's memory is measured instead")
def test_cpu_memory_is_the_peak_resident_set():
    held = torch.ones(2**28, dtype=torch.uint8)
    stats = memory_stats()
    assert held.numel() / 2**30 < stats.peak_allocated_gib <= stats.total_gib
    assert stats.peak_reserved_gib == stats.peak_allocated_gib
    assert stats.allocation_retries == 0
    assert stats.total_gib == device_info().memory_gib


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs one CUDA device")
def test_cuda_memory_follows_an_allocation():
    torch.cuda.reset_peak_memory_stats()
    before = memory_stats()
    block = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    grown = memory_stats()
    assert grown.peak_allocated_gib - before.peak_allocated_gib == pytest.approx(
        block.numel() / 2**30, abs=0.01
    )
    assert grown.peak_allocated_gib <= grown.peak_reserved_gib <= grown.total_gib
    info = device_info()
    assert info.name == torch.cuda.get_device_name()
    assert info.memory_gib == grown.total_gib
    spec = find_device(info.name)
    if spec is not None:
        assert 0.97 * spec.memory_gib < info.memory_gib <= spec.memory_gib


def test_importing_flops_and_hardware_needs_no_torch():
    modules = "qwen3_sft.hardware, qwen3_sft.families.flops"
    code = f"import sys, {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

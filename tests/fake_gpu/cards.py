"""Graphics cards that are not there: what torch.cuda says of each, for FakeTensors on "cuda"."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qwen3_sft.hardware import find_device

MULTIPROCESSORS = {"H200": 132, "B200": 148, "A100 80GB": 108}
CAPABILITIES = {"H200": (9, 0), "B200": (10, 0), "A100 80GB": (8, 0)}
GIB = 2**30


@dataclass
class Card:
    """One kind of card, and what was asked of it.

    Attributes:
        name: short, of `hardware.DEVICES`.
        count: how many there are.
        allocated, reserved, free: bytes now; the peaks are twice the first two.
        chosen: devices that `set_device` was called with.
        waits: calls of `synchronize`.
    """

    name: str = "H200"
    count: int = 1
    allocated: int = 20 * GIB
    reserved: int = 30 * GIB
    free: int = 40 * GIB
    chosen: list[torch.device] = field(default_factory=list)
    waits: int = 0

    @property
    def driver_name(self) -> str:
        spec = find_device(self.name)
        return f"NVIDIA {(*spec.driver_names, spec.name)[0]}"

    @property
    def total(self) -> int:
        return find_device(self.name).memory_mib * 2**20

    def answers(self) -> dict[str, Callable[..., Any]]:
        """Functions of torch.cuda, with the names of their arguments."""
        properties = SimpleNamespace(
            name=self.driver_name, total_memory=self.total, major=self.capability[0],
            minor=self.capability[1], multi_processor_count=MULTIPROCESSORS[self.name],
        )  # fmt: skip
        statistics = {
            "allocated_bytes.all.peak": 2 * self.allocated,
            "reserved_bytes.all.peak": 2 * self.reserved, "num_alloc_retries": 3,
        }  # fmt: skip
        return {
            "is_available": lambda: True,
            "device_count": lambda: self.count,
            "current_device": lambda: 0,
            "set_device": self.chosen.append,
            "get_device_name": lambda device=None: self._of(device) and self.driver_name,
            "get_device_capability": lambda device=None: self._of(device) and self.capability,
            "get_device_properties": lambda device=None: self._of(device) and properties,
            "is_bf16_supported": lambda including_emulation=True: True,
            "synchronize": self._wait,
            "memory_stats": lambda device=None: statistics,
            "mem_get_info": lambda device=None: (self.free, self.total),
            "memory_allocated": lambda device=None: self.allocated,
            "memory_reserved": lambda device=None: self.reserved,
            "max_memory_allocated": lambda device=None: 2 * self.allocated,
            "_exchange_device": self._exchange,
            "_maybe_exchange_device": self._exchange,
        }  # fmt: skip

    @property
    def capability(self) -> tuple[int, int]:
        return CAPABILITIES[self.name]

    def _of(self, device: Any) -> bool:
        """Refuse a device that is none of these cards."""
        device = torch.device("cuda", device or 0) if isinstance(device, int | None) else device
        device = torch.device(device)
        assert device.type == "cuda", device
        assert (device.index or 0) < self.count, device
        return True

    def _wait(self, device: Any = None) -> None:
        self.waits += 1

    def _exchange(self, index: int) -> int:
        assert index < self.count, index
        return 0


def insert(card: Card, patch: pytest.MonkeyPatch) -> Card:
    """Have torch.cuda answer for a card."""
    for name, function in card.answers().items():
        assert hasattr(torch.cuda, name)
        patch.setattr(torch.cuda, name, function)
    # FakeTensorMode would put the values of `torch.tensor(..., device="cuda")` on the card.
    patch.setattr(FakeTensorMode, "avoid_device_init", True)
    return card

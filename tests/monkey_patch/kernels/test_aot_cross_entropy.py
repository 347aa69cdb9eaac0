"""The kernel of linear cross entropy, compiled for GPUs that are not there, in its own process."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

import pytest
import torch

from monkey_patch.kernels import aot
from monkey_patch.kernels.linear_cross_entropy.triton.rows import cross_entropy_rows_launch
from tests.support.compiler import run_compiling

pytestmark = pytest.mark.kernel

VOCAB = 151936  # Qwen3's
CASES = [(torch.bfloat16, target) for target in ("sm_90", "sm_100", "sm_120")]
CASES.append((torch.float32, "sm_90"))


def compile_all() -> Any:
    found = []
    for dtype, target in CASES:
        logits = torch.empty(4096, VOCAB, dtype=dtype, device="meta")
        targets = torch.empty(4096, dtype=torch.int64, device="meta")
        losses = torch.empty(4096, device="meta")
        launch = cross_entropy_rows_launch(logits, targets, losses, gradient=True)
        ptx = aot.compile_for(launch, target).asm["ptx"]
        wide = {"loads": ptx.count("ld.global.v4"), "stores": ptx.count("st.global.v4")}
        found.append(asdict(aot.compile_ahead(launch, target)) | wide)
    return found


def test_no_spills_full_occupancy_and_wide_accesses(tmp_path):
    module = "tests.monkey_patch.kernels.test_aot_cross_entropy"
    found = json.loads(run_compiling("-m", module, cache=tmp_path))
    assert len(found) == len(CASES)
    for one in found:
        assert one["spill_bytes"] == one["spill_stores"] == one["spill_loads"] == 0, one
        assert one["programs_per_sm"] >= 4, one
        assert one["loads"] == 2 * one["stores"] > 0, one


if __name__ == "__main__":
    json.dump(compile_all(), sys.stdout)

"""Outside this suite, which mends it, Triton's interpreter must not compute bfloat16 in silence."""

import os
import subprocess
import sys

import pytest
import torch

from monkey_patch.kernels.interpreter_check import product_of_ones
from tests.support.interpreter import use_kernels

PROGRAM = """
import sys, torch
from monkey_patch.kernels.scatter_moe.op import scatter_moe
dtype = getattr(torch, sys.argv[1])
x, up, down = (torch.ones(shape, dtype=dtype) for shape in ((4, 16), (2, 32, 16), (2, 16, 16)))
index, weights = torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1, dtype=dtype)
print(scatter_moe(x, up, down, index, weights).sum().item())
"""


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_process_of_a_user(dtype):
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", PROGRAM, dtype]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if dtype == "float32":
        assert run.returncode == 0, run.stderr
        hidden = torch.sigmoid(torch.tensor(16.0)) * 16 * 16
        assert float(run.stdout) == pytest.approx(4 * 16 * 16 * hidden.item(), rel=1e-5)
    else:
        assert run.returncode == 1
        assert "computes products of bfloat16 wrong, without an error of its own" in run.stderr


def test_this_suite_mends_it(monkeypatch):
    use_kernels(monkeypatch)
    assert product_of_ones()

"""Bytes that linear cross entropy moves on a GPU, counted operator by operator on fake tensors.

Those are on the CPU, where autograd asks for no device, and take the branch of the kernels.

An operator reads its arguments and writes its result or what it changes; the kernel's passes are
those that `tests/monkey_patch/kernels/test_cross_entropy_rows.py` counts in the interpreter.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from monkey_patch.kernels.linear_cross_entropy import linear_cross_entropy_sum
from monkey_patch.kernels.linear_cross_entropy.chunk import tokens_per_chunk
from monkey_patch.kernels.linear_cross_entropy.triton import rows
from tests.support.interpreter import use_kernels

V, D = 151936, 2048  # of Qwen3-30B-A3B
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    use_kernels(monkeypatch)


class Traffic(TorchDispatchMode):
    """Bytes read and written, by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.bytes[str(func)] += self._moved(func, args, out)
        return out

    def _moved(self, func: Any, args: Any, out: Any) -> int:
        name = func._schema.name.partition("::")[2]
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
        if name in ("gather", "scatter_add_"):  # touch one element per row
            return 0
        if func.is_view or func.namespace == "prim" or name == "empty_like":
            return 0
        written = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        arguments = zip(func._schema.arguments, args, strict=False)
        changed = [a for s, a in arguments if s.alias_info is not None and s.alias_info.is_write]
        # A changed argument that is returned is written once.
        written += changed if not written or name == "cross_entropy_rows" else []
        unread = changed if name == "copy_" else tensors if name == "zeros_like" else []
        if name == "cross_entropy_rows":
            tensors += (rows.READS - 1) * [args[0]]
            written += (rows.WRITES - 1) * [args[0]]
        if name == "add_product" and args[3]:
            unread = [args[0]]
        read = sum(tensor.nbytes for tensor in tensors) - sum(tensor.nbytes for tensor in unread)
        return read + sum(tensor.nbytes for tensor in written)


def before(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk: int) -> None:
    """What the op did until it had a kernel: float32 logits, and a product added to a sum."""
    d_hidden = torch.empty_like(hidden)
    d_weight = torch.zeros_like(weight, dtype=torch.float32)
    for start in range(0, len(hidden), chunk):
        here = slice(start, start + chunk)
        logits = (hidden[here] @ weight.T).float()
        log_sum = torch.logsumexp(logits, dim=-1)
        (log_sum - logits.gather(1, targets[here, None])[:, 0]).sum()
        probs = logits.sub_(log_sum[:, None]).exp_()
        probs.scatter_add_(1, targets[here, None], -torch.ones_like(probs[:, :1]))
        d_logits = probs.to(BF16)
        d_hidden[here] = d_logits @ weight
        d_weight += d_logits.T @ hidden[here]
    d_weight.to(BF16)


def traffic(function: Any, positions: int, *options: Any) -> Counter[str]:
    """Return the bytes of `positions` positions with all gradients, by operator."""
    with FakeTensorMode():
        hidden = torch.empty(positions, D, dtype=BF16)
        weight = torch.empty(V, D, dtype=BF16)
        targets = torch.empty(positions, dtype=torch.int64)
        if function is not before:
            hidden.requires_grad_()
            weight.requires_grad_()
        with Traffic() as seen:
            function(hidden, weight, targets, *options)
    return seen.bytes


def one_chunk(function: Any, chunk: int) -> float:
    """Return the bytes per position of a chunk that is neither the first nor the only one."""
    two, one = (traffic(function, n * chunk, chunk).total() for n in (2, 1))
    return (two - one) / chunk


def test_bytes_per_position_are_less_than_half():
    chunk = tokens_per_chunk(V, 2)
    old, new = one_chunk(before, 1024), one_chunk(linear_cross_entropy_sum, chunk)
    # Logits: out of a product, read twice and written by the kernel, read by two products. Beside
    # them the weight, read twice, its float32 sum, read and written, and rows of D.
    by_hand = 6 * 2 * V + (2 * 2 + 8) * V * D / chunk
    assert new == pytest.approx(by_hand, rel=0.02)
    # Per logit out of a product and cast 8, log-sum-exp 4, minus 8, exp 8, cast 6, two products 4.
    assert old == pytest.approx(38 * V + (2 * 2 + 12) * V * D / 1024, rel=0.02)
    assert new < old / 2


@pytest.mark.parametrize("chunk", [1024, 4096])
def test_they_are_so_at_the_same_chunk_too(chunk):
    assert one_chunk(linear_cross_entropy_sum, chunk) < 0.75 * one_chunk(before, chunk)

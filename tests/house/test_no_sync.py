"""Nothing inside a step makes a GPU wait for the host or the host for a GPU.

There is no GPU here, so a step on the CPU is watched for what would be a wait on one: operators
whose result's size or Python value depends on a tensor's data, and copies from the host that are
not asynchronous. What only a CPU runs is exempt by name; tests/gpu runs the rest on a device.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.support.source_tree import ROOT
from tests.support.training import make_trainer

# aten operators whose result has a size or a value that only the data tells.
READS = {
    "_local_scalar_dense", "is_nonzero", "item", "equal", "nonzero", "nonzero_static_", "argwhere",
    "masked_select", "unique_dim", "_unique", "_unique2", "unique_consecutive", "bincount",
    "unique_dim_consecutive", "histc", "multinomial", "allclose",
}  # fmt: skip
# Methods that hand data to Python without an operator of their own on a CPU.
HOST_METHODS = {"tolist", "numpy", "cpu", "item", "__array__"}
CREATES = {"tensor", "as_tensor", "new_tensor", "asarray"}

# function of a file of ours or of a package -> why a GPU does not wait there
EXEMPT = {
    ("monkey_patch/kernels/varlen_attention/op.py", "_per_document"):
        "attention of CPUs; a GPU in bf16 runs torch's varlen kernel",
    ("monkey_patch/router_aux_loss.py", "begin"):
        "copies the sums to the device in the first step and is there ever after",
    ("monkey_patch/linear_cross_entropy.py", "_labelled"):
        "the number of labels is on the device already",
    ("torch/optim/optimizer.py", "_get_value"):
        "AdamW's step count lies on the host, and on the device where it is fused",
}  # fmt: skip


WATCHING = {"place", "report", "__torch_dispatch__", "__torch_function__"}


class WaitError(AssertionError):
    """An operation inside a step for which a GPU and the host would wait for one another."""


def place() -> list[tuple[str, str]]:
    """File and function of the calls that led here, the innermost first."""
    frame, found = sys._getframe(1), []
    while frame is not None:
        name = frame.f_code.co_filename.replace(str(ROOT) + "/", "")
        found.append((name.split("site-packages/")[-1], frame.f_code.co_name))
        frame = frame.f_back
    return found


def report(what: str) -> None:
    stack = place()
    if any(site in EXEMPT for site in stack[:8]):
        return
    named = [(f, n) for f, n in stack if n not in WATCHING and not f.startswith("torch/")]
    raise WaitError(f"{what} in {' < '.join(f'{file}:{name}' for file, name in named[:6])}")


class Operators(TorchDispatchMode):
    """Refuses operators that read the data."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        self.seen.add(str(func))
        reads = name in READS
        if name in ("index", "index_put", "index_put_"):
            reads = any(isinstance(t, torch.Tensor) and t.dtype in (torch.bool, torch.uint8)
                        for t in tree_leaves(args[1]))  # fmt: skip
        elif name == "repeat_interleave":
            is_counted = isinstance(args[-1], torch.Tensor)
            reads = is_counted and kwargs.get("output_size") is None
        if reads:
            report(str(func))
        return func(*args, **kwargs)


class Copies(TorchFunctionMode):
    """Refuses methods that hand data to Python, and copies from the host that wait."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in HOST_METHODS:
            report(f"Tensor.{name}")
        if name in CREATES and (kwargs.get("device") is not None or name == "new_tensor"):
            report(f"{name}(..., device=...)")
        if name == "where" and any(isinstance(a, int | float) for a in args[1:]):
            report("torch.where with a number, which becomes a tensor and is copied,")
        has_device = any(isinstance(a, torch.device) for a in (*args, *kwargs.values()))
        if name == "to" and has_device and not kwargs.get("non_blocking"):
            # Others' layers bring along buffers, which are on the device.
            is_ours = (ROOT / place()[1][0]).is_file()
            if is_ours:
                report("Tensor.to(device) without non_blocking=True")
        return func(*args, **kwargs)


CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "wait",
    [
        lambda t: t[0].item(), lambda t: t.tolist(), lambda t: t.cpu(), lambda t: t.numpy(),
        lambda t: bool(t.sum() > 0), lambda t: float(t[0]), lambda t: t[t > 0],
        lambda t: t.__setitem__(t > 0, 0.0), lambda t: t.nonzero(), lambda t: torch.where(t > 0),
        lambda t: t.unique(), lambda t: t.masked_select(t > 0), lambda t: t.equal(t),
        lambda t: t.repeat_interleave(t.long()), lambda t: torch.where(t > 0, t, 0.0),
        lambda t: torch.tensor([1.0], device=CPU), lambda t: t.new_tensor([1.0]),
        lambda t: t.to(CPU),
    ],
)  # fmt: skip
def test_what_would_wait_is_seen(wait):
    tensor = torch.ones(3)
    with Copies(), Operators(), pytest.raises(WaitError, match="test_no_sync"):
        wait(tensor)


@pytest.mark.parametrize(
    "go",
    [
        lambda t: t.masked_fill(t > 0, 0.0), lambda t: torch.zeros((), device=CPU),
        lambda t: t.to(CPU, non_blocking=True), lambda t: t.repeat_interleave(2),
        lambda t: t[t.long()], lambda t: t.bfloat16(), lambda t: torch.full_like(t, 2.0),
        lambda t: t[1], lambda t: t.topk(2), lambda t: t.clamp(max=1.0),
    ],
)  # fmt: skip
def test_what_waits_for_nothing_passes(go):
    with Copies(), Operators():
        go(torch.ones(3))


RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "full": {"activation_checkpointing": "full"},
    "selective": {"activation_checkpointing": "selective", "patches": (
        "scatter_moe_recompute", "varlen_attention", "router_aux_loss", "linear_cross_entropy")},
    "8 bit, delayed clip": {"optim": "adamw_torch_8bit", "clip": "delayed"},
    "8 bit, clip per tensor": {"optim": "adamw_torch_8bit", "clip": "per_tensor"},
    "Adafactor": {"optim": "adafactor", "clip": "delayed"},
    "AdamW": {"optim": "adamw_torch", "clip": "per_tensor"},
}  # fmt: skip


def trainer_of(run: str, model: Any, tokenizer: Any, folder: Path, **others: Any) -> Any:
    """Return the trainer of an entry of `RUNS`; weights in bfloat16 where they are rounded."""
    given = RUNS[run] | others
    if "clip" in given:
        given |= {"optimizer_in_backward": True, "max_grad_norm": 0.5}
    else:
        given["gradient_accumulation_steps"] = 2
    if given.get("optim") == "adamw_torch_8bit":
        model = model.to(torch.bfloat16)
        given["optim_args"] = "bf16_stochastic_round=True"
    return make_trainer(model, tokenizer, folder, aux=0.01, logging_steps=100, **given)


@pytest.mark.parametrize("run", RUNS)
def test_a_micro_batch_waits_for_nothing(tiny_moe, tokenizer, tmp_path, run):
    trainer = trainer_of(run, tiny_moe, tokenizer, tmp_path, max_steps=2)
    step, operators, number = trainer.training_step, Operators(), []

    def watched(*args: Any, **kwargs: Any) -> Any:
        number.append(trainer.state.global_step)
        with Copies(), operators:
            return step(*args, **kwargs)

    trainer.training_step = watched
    trainer.train()
    assert number in ([0, 1], [0, 0, 1, 1])
    assert "aten._scaled_dot_product_flash_attention_for_cpu_backward.default" in operators.seen

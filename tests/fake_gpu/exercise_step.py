"""Whole training steps on tensors that claim to be on a GPU: shapes, dtypes, devices.

A FakeTensor of "cuda" beside one of the CPU is an error, as on a GPU, and so is reading a value.
"""

from __future__ import annotations

import inspect
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torchao.optim import AdamW8bit
from torchao.optim.subclass_8bit import get_qmap_signed, get_qmap_unsigned
from transformers import Adafactor
from triton.tools.tensor_descriptor import TensorDescriptor

from monkey_patch import linear_fp8 as linear_fp8_module
from monkey_patch.core import PatchError
from monkey_patch.experts_fp8 import experts_fp8
from monkey_patch.kernels.linear_cross_entropy import op as cross_entropy
from monkey_patch.kernels.scatter_moe.triton import warm_up
from monkey_patch.linear_fp8 import linear_fp8
from qwen3_sft.demo.model import tiny_config
from qwen3_sft.optimizers import in_backward
from qwen3_sft.optimizers.in_backward import BackwardOptimizer
from tests.support.fake_step import Allocations, forward, make_model

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")

BF16, FP32, CUDA = torch.bfloat16, torch.float32, torch.device("cuda", 0)
TOKENS = 256


class Kernels:
    """What is launched: each call is bound to its kernel's signature, and none runs.

    Attributes:
        ours: signatures of the expert kernels, as far as they are compiled for.
        prepared: those that were compiled before the first of them.
        others: names of other packages' kernels.
    """

    def __init__(self):
        self.ours, self.prepared, self.others = set(), set(), set()

    def launcher(self, kernel):
        def launch(*args, num_warps=4, num_stages=2, **kwargs):
            arguments = inspect.signature(kernel.fn).bind(*args, **kwargs).arguments
            tensors = [v for v in arguments.values() if isinstance(v, torch.Tensor)]
            assert {tensor.device for tensor in tensors} == {CUDA}, kernel.fn
            if kernel.fn.__module__.startswith("monkey_patch"):
                self.ours.add(signature(kernel, arguments, num_warps, num_stages))
            else:
                self.others.add(kernel.fn.__name__)

        return launch

    def compile_all(self, launches):
        for launch in launches:
            of_launch = launch.arguments, launch.num_warps, launch.num_stages
            self.prepared.add(signature(launch.kernel, *of_launch))
        return 0.5


def signature(kernel, arguments, num_warps, num_stages):
    """What Triton compiles anew for: constants, and the dtypes of tensors."""
    found = {}
    for name, value in arguments.items():
        if isinstance(value, TensorDescriptor):
            found[name] = f"descriptor of {value.base.dtype}, {value.block_shape}"
        elif name.isupper() or not isinstance(value, int | float):
            found[name] = str(getattr(value, "dtype", value))
    return kernel.fn.__name__, num_warps, num_stages, *sorted(found.items())


@pytest.fixture
def kernels(monkeypatch):
    from triton.runtime.jit import KernelInterface

    found = Kernels()
    monkeypatch.setattr(KernelInterface, "__getitem__", lambda kernel, grid: found.launcher(kernel))
    monkeypatch.setattr(warm_up, "_ready", set())
    monkeypatch.setattr(warm_up, "compile_all", found.compile_all)
    return found


def model_of(weights, experts="scatter_moe", policies=None, others=(), layers=2):
    config = tiny_config(
        1024, hidden_size=128, moe_intermediate_size=128, num_hidden_layers=layers, num_experts=8,
        head_dim=32,
    )  # fmt: skip
    return make_model(config, weights, experts, policies or {"none": layers}, "cuda", others)


def gradients(model, weights):
    """Train one micro-batch; float32 weights under autocast."""
    with Allocations(model):
        with torch.autocast("cuda", BF16, enabled=weights == FP32):
            loss = forward(model, TOKENS)
        assert loss.device == CUDA
        loss.backward()


@pytest.mark.parametrize(
    ("name", "experts", "policies", "weights"),
    [
        ("H200", "scatter_moe", {"none": 1}, FP32),
        ("B200", "scatter_moe_recompute", {"full": 1, "selective": 1}, BF16),
    ],
    ids=["float32 under autocast on H200", "bfloat16 on B200"],
)
def test_a_micro_batch(insert_card, kernels, name, experts, policies, weights):
    insert_card(name)
    with FakeTensorMode():
        model = model_of(weights, experts, policies, layers=sum(policies.values()))
        gradients(model, weights)
        for parameter in model.parameters():
            assert parameter.grad.dtype == weights
            assert parameter.grad.device == CUDA
    assert kernels.ours == kernels.prepared, kernels.ours ^ kernels.prepared
    assert kernels.others == {"_rms_norm_forward_kernel", "_rms_norm_backward_kernel"}


def test_the_head_sums_its_gradient_in_the_product(card):
    """The operator is not entered in a step."""
    with FakeTensorMode():
        total = torch.empty(64, 32, device=CUDA)
        d_logits, hidden = (torch.empty(16, n, dtype=BF16, device=CUDA) for n in (64, 32))
        with Allocations(torch.nn.Module()) as seen:
            cross_entropy._add_product._init_fn(total, d_logits, hidden, False)
    assert seen.peak <= total.nbytes + d_logits.nbytes + hidden.nbytes, "nothing beside them"


@pytest.mark.parametrize(("name", "scaling"), [("H200", "blockwise"), ("B200", "mxfp8")])
def test_a_micro_batch_in_fp8(insert_card, kernels, uncompiled, name, scaling):
    insert_card(name)
    linear_fp8_module._compiled.cache_clear()
    with FakeTensorMode():
        model = model_of(FP32, experts_fp8(scaling=scaling), others=[linear_fp8()], layers=3)
        gradients(model, FP32)
    assert all(parameter.grad.device == CUDA for parameter in model.parameters())
    assert kernels.ours == kernels.prepared, kernels.ours ^ kernels.prepared
    assert [function.__name__ for function in uncompiled] == ["fp8_linear"]
    linear_fp8_module._compiled.cache_clear()


@pytest.mark.parametrize(
    ("name", "patches", "problem"),
    [
        ("A100 80GB", {"others": [linear_fp8()]}, "compute capability 8.0, FP8 needs 8.9"),
        ("A100 80GB", {"experts": experts_fp8()}, "compute capability 8.0, FP8 needs 8.9"),
        (
            "H200",
            {"experts": experts_fp8(scaling="mxfp8")},
            "compute capability 9.0, its scales need 10.0",
        ),
    ],
)
def test_cards_that_cannot_are_refused(insert_card, name, patches, problem):
    insert_card(name)
    with FakeTensorMode(), pytest.raises(PatchError, match=problem):
        model_of(FP32, **patches, layers=3)


OPTIMIZERS = {
    "adamw8bit": partial(AdamW8bit, lr=1e-3, bf16_stochastic_round=True),
    "adafactor": partial(Adafactor, lr=1e-3, scale_parameter=False, relative_step=False),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_update_in_the_backward_pass_reads_nothing(card, kernels, uncompiled, monkeypatch, name):
    get_qmap_signed(), get_qmap_unsigned()  # made once, by reading values
    with FakeTensorMode():
        model = model_of(BF16, layers=1)
        optimizer = OPTIMIZERS[name](model.parameters())
        fused = BackwardOptimizer(model, optimizer, clip="delayed", max_grad_norm=1.0)
        optimizer.param_groups[0][in_backward._PREVIOUS] = 1.0  # as from the second step on
        gradients(model, BF16)
        states = [
            value for state in optimizer.state.values() for key, value in state.items()
            if isinstance(value, torch.Tensor) and key != "step"
        ]  # fmt: skip
        assert all(parameter.grad is None for parameter in model.parameters())
        assert len(optimizer.state) == len(list(model.parameters()))
        assert states
        assert all(state.device == CUDA for state in states)
        with pytest.raises(DataDependentOutputException):  # the one wait of a step
            fused.norm().item()

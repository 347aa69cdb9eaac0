"""Bytes of the casts of float32 experts, against the casts of a step on fake tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Qwen3MoeConfig

from qwen3_sft.distributed.engine import Engine
from qwen3_sft.families.known_models import KNOWN_CONFIGS
from qwen3_sft.model.meta_model import meta_model
from qwen3_sft.model.sizes import Sizes
from qwen3_sft.options.recipe import parse_options
from qwen3_sft.plan.expert_casts import expert_cast_bytes
from qwen3_sft.plan.plan import Gpu
from qwen3_sft.plan.planner import plan_run
from tests.support.fake_step import Allocations, as_on_a_gpu, forward, make_model

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
BF16, FP32 = torch.bfloat16, torch.float32


class Casts(Allocations):
    """Bytes read and written by casts of all experts' weights of a layer."""

    moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        is_cast = str(func) == "aten.to.dtype" and out.dtype != args[0].dtype
        if is_cast and out.ndim == 3 and len(out) == 128:
            self.moved += args[0].nbytes + out.nbytes
        return out


@pytest.mark.parametrize(
    ("experts", "layers"),
    [
        ("scatter_moe", {"none": 3}),
        ("scatter_moe", {"full": 3}),
        ("scatter_moe_recompute", {"selective": 3}),
        ("scatter_moe_recompute", {"full": 1, "selective": 1, "none": 1}),
    ],
    ids=str,
)
def test_bytes_are_those_of_a_step(experts, layers):
    config = Qwen3MoeConfig(
        **KNOWN_CONFIGS["Qwen/Qwen3-30B-A3B"] | {"num_hidden_layers": 3, "vocab_size": 1024}
    )
    with as_on_a_gpu(), FakeTensorMode():
        model = make_model(config, FP32, experts, layers)
        sizes = Sizes.of(model)
        with Casts(model) as seen, torch.autocast("cpu", BF16):
            forward(model, 4096).backward()
    planned = expert_cast_bytes(
        sizes.experts, layers, keeps_hidden=experts == "scatter_moe", weights=FP32, compute=BF16
    )
    assert seen.moved == planned


def plan_of(*words: str, engine: str = "single") -> Any:
    named = ("--model_name_or_path", "Qwen/Qwen3-30B-A3B", "--activation_checkpointing", "full")
    options = parse_options([*named, *words], needs_data=False)
    model = meta_model("Qwen/Qwen3-30B-A3B")
    return plan_run(model, options, Engine(engine), Gpu.named("H200"), BF16, {"WORLD_SIZE": "8"})


def test_the_plan_says_what_float32_experts_cost():
    plan = plan_of("--dtype", "float32", engine="ddp")
    experts = 48 * 128 * 3 * 2048 * 768
    assert plan.cast_bytes == 18 * experts
    assert any("move 522 GB per micro-batch: --dtype bfloat16" in line for line in plan.lines())
    expected, without = plan.expected, plan_of("--dtype", "bfloat16", engine="ddp").expected
    assert expected is not None
    assert without is not None
    assert expected.parts["casts"] == pytest.approx(18 * experts / 3.6e12)
    assert without.parts["casts"] == 0


@pytest.mark.parametrize(
    ("words", "engine"),
    [
        (("--dtype", "bfloat16"), "single"),
        (("--fp8", "experts"), "single"),
        ((), "native"),
        ((), "fsdp"),
    ],
)
def test_where_nothing_is_cast_nothing_is_said(words, engine):
    plan = plan_of(*words, engine=engine)
    assert plan.cast_bytes == 0
    assert not any("casts of the experts" in line for line in plan.lines())

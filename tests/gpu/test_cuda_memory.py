"""The memory warm-up, its errors and the plan check on a CUDA device; `bash bench/gpu.sh`."""

import math
from functools import partial

import pytest
import torch
from torchao.optim import AdamW8bit
from transformers import Adafactor, TrainerCallback

from qwen3_sft.errors import GpuMemoryError
from qwen3_sft.optimizers.in_backward import BackwardOptimizer
from qwen3_sft.training.plan_check import PlanCheck
from tests.support.training import make_trainer, weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LOW_BIT = {"optim": "adamw_torch_8bit", "optim_args": "bf16_stochastic_round=True"}
IN_BACKWARD = {"optimizer_in_backward": True, "clip": "per_tensor"}
ADAFACTOR = partial(Adafactor, scale_parameter=False, relative_step=False)


class _AtFirstStep(TrainerCallback):
    """What the warm-up leaves, and that nothing more is compiled after it."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            self.weights, self.random = weights(model), torch.cuda.get_rng_state()
            self.peak = torch.cuda.max_memory_allocated()
            torch.compiler.set_stance("fail_on_recompile")


def cuda_trainer(model, tokenizer, folder, **arguments):
    values = {"use_cpu": False, "max_steps": 3, "memory_warm_up": True} | arguments
    return make_trainer(model.cuda(), tokenizer, folder, **values)


@pytest.fixture(autouse=True)
def _stance():
    yield
    torch.compiler.set_stance("default")


@pytest.mark.parametrize(
    "arguments",
    [
        {"optim": "adamw_torch", "gradient_accumulation_steps": 2},
        LOW_BIT,
        LOW_BIT | IN_BACKWARD,
        {"optim": "adafactor"} | IN_BACKWARD,
    ],
)
def test_the_warm_up_has_the_peak_and_the_compilation_of_the_run(
    tiny_moe, tokenizer, tmp_path, arguments
):
    model, at_first = tiny_moe.to(torch.bfloat16), _AtFirstStep()
    trainer = cuda_trainer(model, tokenizer, tmp_path, callbacks=(at_first,), **arguments)
    before, random = weights(trainer.model), torch.cuda.get_rng_state()
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    for name, tensor in before.items():
        assert torch.equal(at_first.weights[name], tensor), name
        assert not torch.equal(trainer.model.get_parameter(name), tensor), name
    assert torch.equal(at_first.random, random)
    # Small tensors of the log and of the step's own sums come on top.
    assert torch.cuda.max_memory_allocated() <= at_first.peak + 2**20


@pytest.mark.parametrize("optimizer_class", [AdamW8bit, ADAFACTOR, torch.optim.AdamW])
@pytest.mark.parametrize("clip", ["per_tensor", "delayed"])
def test_the_host_never_waits_in_a_step(optimizer_class, clip):
    model = torch.nn.Sequential(*(torch.nn.Linear(128, 128) for _ in range(6)))
    model = model.cuda().to(torch.bfloat16)
    options = {} if optimizer_class is not torch.optim.AdamW else {"fused": True}
    optimizer = optimizer_class(model.parameters(), lr=1e-3, **options)
    in_backward = BackwardOptimizer(model, optimizer, clip=clip, max_grad_norm=1.0)
    batch = torch.ones(4, 128, device="cuda", dtype=torch.bfloat16)
    for step in range(4):  # the sample of lost updates turns through all 12 tensors
        loss = model(batch).sum()
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            loss.backward()
            norm = in_backward.norm()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert math.isfinite(norm.item())
        in_backward.end_step(norm.item())


def test_a_gpu_that_is_too_small_says_what_to_set(tiny_moe, tokenizer, tmp_path):
    trainer = cuda_trainer(tiny_moe, tokenizer, tmp_path, per_device_train_batch_size=2048)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    limit = torch.cuda.memory_reserved() + 256 * 2**20
    torch.cuda.set_per_process_memory_fraction(limit / total)
    try:
        with pytest.raises(GpuMemoryError) as caught:
            trainer.train()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    text = str(caught.value)
    assert "ran out: forward and backward of a micro-batch; this is the memory warm-up" in text
    for word in ("wanted", "reserved", "are free", "--activation_checkpointing selective"):
        assert word in text


def test_the_plan_check_measures_the_peak(tiny_moe, tokenizer, tmp_path):
    records = []
    trainer = cuda_trainer(tiny_moe, tokenizer, tmp_path)
    check = PlanCheck({"weights": 1}, None, records.append, trainer.metrics, "whole", steps=2)
    trainer.add_callback(check)
    trainer.train()
    (record,) = records
    size = sum(p.numel() * p.element_size() for p in trainer.model.parameters())
    assert record["peak"]["measured"] > 3 * size
    assert record["tokens_per_second"]["measured"] > 0

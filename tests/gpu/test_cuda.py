"""What only a CUDA device can show; `bash bench/gpu.sh` runs it."""

import copy
import json

import pytest
import torch

import monkey_patch
from monkey_patch.kernels.linear_cross_entropy import linear_cross_entropy_sum, op
from monkey_patch.kernels.linear_cross_entropy.reference import linear_cross_entropy_sum_reference
from monkey_patch.kernels.varlen_attention import varlen_attention
from monkey_patch.kernels.varlen_attention.reference import varlen_attention_reference
from qwen3_sft.demo.model import write_checkpoint
from qwen3_sft.model.loading import load_model
from qwen3_sft.options.model_args import ModelArguments
from qwen3_sft.packing.isolation import check_isolation
from qwen3_sft.training.determinism import make_deterministic
from tests.support.oracle import assert_close
from tests.support.training import PATCHES, Documents, make_trainer, nll_sum, weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")
BF16 = torch.bfloat16


def assert_matches(run, reference, tensors, dtype):
    """Compare output and every gradient with the reference in float64."""
    inputs = [t.to(CUDA, dtype).requires_grad_() for t in tensors]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    out, truth = run(*inputs), reference(*exact)
    direction = torch.randn_like(truth)
    out.backward(direction.to(out.dtype))
    truth.backward(direction)
    assert_close(out, truth, name="out", rms=None if out.dtype == dtype else 2e-2)
    for index, (a, e) in enumerate(zip(inputs, exact, strict=True)):
        assert_close(a.grad, e.grad, name=f"gradient {index}")


@pytest.mark.parametrize("dtype", [torch.float16, BF16, torch.float32])
def test_varlen_attention(dtype):
    ends = torch.tensor([0, 1, 18, 18, 150, 400], dtype=torch.int32, device=CUDA)
    tensors = tuple(torch.randn(heads, 400, 64) for heads in (8, 2, 2))
    assert_matches(
        lambda q, k, v: varlen_attention(q, k, v, ends, 250, 0.125),
        lambda q, k, v: varlen_attention_reference(q, k, v, ends, 0.125),
        tensors,
        dtype,
    )


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
def test_linear_cross_entropy(dtype):
    targets = torch.randint(0, 3000, (700,), device=CUDA)
    assert_matches(
        lambda hidden, weight: linear_cross_entropy_sum(hidden, weight, targets, chunk_tokens=256),
        lambda hidden, weight: linear_cross_entropy_sum_reference(hidden, weight, targets),
        (torch.randn(700, 128), torch.randn(3000, 128) / 8),
        dtype,
    )


def test_the_gradient_of_the_head_is_summed_in_place():
    total = torch.zeros(32768, 2048, device=CUDA)
    d_logits, hidden = (torch.randn(64, n, device=CUDA).to(BF16) for n in total.shape)
    op._add_product(total, d_logits, hidden, True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    op._add_product(total, d_logits, hidden, False)
    assert torch.cuda.max_memory_allocated() - before < total.nbytes / 2
    assert_close(total, 2 * (d_logits.double().T @ hidden.double()), rms=1e-5)


@pytest.mark.usefixtures("liger_is_undone")
@pytest.mark.parametrize("use_liger", [False, True])
def test_patched_model_equals_the_plain_one(tokenizer, tmp_path, use_liger):
    write_checkpoint(tmp_path / "base", tokenizer)
    options = ModelArguments(use_liger=use_liger)
    model = load_model(tmp_path / "base", options, CUDA, torch.float32, "torch_varlen").to(CUDA)
    plain = copy.deepcopy(model).cpu() if not use_liger else None
    monkey_patch.apply_patches(model, PATCHES)
    documents = Documents(6, len(tokenizer)).documents
    report = check_isolation(model, documents, 256, tokenizer.pad_token_id, BF16)
    assert report.documents == 6
    if plain is not None:
        held_out = Documents(6, len(tokenizer))
        total, count = nll_sum(plain, held_out)
        assert report.loss == pytest.approx((total / count).item(), rel=2e-2)


def test_training_waits_for_the_device_once_per_step(tiny_moe, tokenizer, tmp_path):
    trainer = make_trainer(
        tiny_moe, tokenizer, tmp_path, max_steps=3, gradient_accumulation_steps=4, use_cpu=False,
        bf16=True, logging_steps=100, max_grad_norm=1.0,
    )  # fmt: skip
    inside = []
    step = trainer.training_step

    def watched(*args, **kwargs):
        torch.cuda.set_sync_debug_mode("error" if trainer.state.global_step else "default")
        try:
            return step(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            inside.append(trainer.state.global_step)

    trainer.training_step = watched
    trainer.train()
    assert len(inside) == 12


@pytest.mark.parametrize("weights", [torch.float32, BF16])
def test_training_lowers_the_loss(tiny_moe, tokenizer, tmp_path, weights):
    trainer = make_trainer(
        tiny_moe.to(weights), tokenizer, tmp_path, max_steps=30, use_cpu=False, bf16=True,
        documents=Documents(4, len(tokenizer)),
    )  # fmt: skip
    trainer.train()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert records[-1]["loss"] < 0.7 * records[0]["loss"]
    assert records[-1]["peak_memory_gib"] > 0


def test_deterministic_runs_are_equal_to_the_last_bit(tiny_moe, tokenizer, tmp_path):
    make_deterministic()
    try:
        found = []
        for number in range(2):
            trainer = make_trainer(
                tiny_moe.to(BF16), tokenizer, tmp_path / str(number), max_steps=4, use_cpu=False,
                bf16=True, aux=0.01,
            )  # fmt: skip
            trainer.train()
            found.append(weights(trainer.model))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])

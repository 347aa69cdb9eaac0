import json
import math

import pytest
import torch
from transformers import TrainerCallback

from qwen3_sft.errors import NonFiniteError
from qwen3_sft.training.metrics import KEYS
from tests.support.faults import outcome
from tests.support.oracle import assert_close
from tests.support.training import Documents, make_trainer, nll_sum, weights

SGD = {"optim": "sgd", "learning_rate": 1.0}


def test_step_equals_plain_torch_on_separate_documents(tiny_moe, tokenizer, tmp_path):
    documents = Documents(6, len(tokenizer))
    trainer = make_trainer(
        tiny_moe, tokenizer, tmp_path, documents=documents, max_steps=1,
        gradient_accumulation_steps=4, **SGD,
    )  # fmt: skip
    gradients = {}

    class _Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            gradients.update({n: p.grad.clone() for n, p in model.named_parameters()})

    trainer.add_callback(_Gradients())
    trainer.train()
    total, count = nll_sum(tiny_moe, documents)
    (total / count).backward()
    for name, parameter in tiny_moe.named_parameters():
        assert_close(gradients[name], parameter.grad, name=name)
    assert trainer.state.log_history[0]["loss"] == pytest.approx((total / count).item(), rel=1e-5)


@pytest.mark.parametrize("aux", [0.0, 0.1])
def test_accumulation_and_micro_batch_size_do_not_matter(tiny_moe, tokenizer, tmp_path, aux):
    results = []
    for batch, accumulate in ((1, 4), (2, 2), (4, 1)):
        trainer = make_trainer(
            tiny_moe, tokenizer, tmp_path / f"{batch}", aux=aux, max_steps=3,
            per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate, **SGD,
        )  # fmt: skip
        trainer.train()
        results.append((trainer.state.log_history[:3], weights(trainer.model)))
    (logs, reference), *others = results
    for other_logs, other in others:
        for a, b in zip(logs, other_logs, strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
            assert b["aux_loss"] == pytest.approx(a["aux_loss"], rel=1e-5)
        for name, tensor in reference.items():
            assert_close(other[name], tensor, name=name, rms=1e-5)


def test_aux_coefficient_changes_the_router_only_when_set(tiny_moe, tokenizer, tmp_path):
    routers = []
    for aux in (0.0, 1.0):
        trainer = make_trainer(tiny_moe, tokenizer, tmp_path, aux=aux, max_steps=1, **SGD)
        trainer.train()
        routers.append(weights(trainer.model)["model.layers.0.mlp.gate.weight"])
    assert not torch.equal(*routers)


def test_bf16_autocast_stays_close_to_float32(tiny_moe, tokenizer, tmp_path):
    losses = []
    for bf16 in (False, True):
        trainer = make_trainer(tiny_moe, tokenizer, tmp_path, max_steps=4, bf16=bf16)
        trainer.train()
        losses.append([h["loss"] for h in trainer.state.log_history if "loss" in h])
        assert trainer.model.dtype == torch.float32
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)


@pytest.mark.parametrize("policy", ["full", "selective"])
def test_activation_checkpointing_changes_nothing(tiny_moe, tokenizer, tmp_path, policy):
    results = []
    for values in ({}, {"activation_checkpointing": policy}):
        trainer = make_trainer(tiny_moe, tokenizer, tmp_path, max_steps=2, aux=0.1, **SGD, **values)
        trainer.train()
        records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
        results.append((records, weights(trainer.model)))
    for a, b in zip(*(records for records, _ in results), strict=True):
        for key in ("loss", "aux_loss", "router_entropy", "expert_load_max_over_mean"):
            assert b[key] == pytest.approx(a[key], rel=1e-6), key
    for name, tensor in results[0][1].items():
        assert_close(results[1][1][name], tensor, name=name)


class _Poison(TrainerCallback):
    """Multiply one gradient by NaN in the steps given, as an overflow would."""

    def __init__(self, parameter, steps):
        self.steps, self.now = steps, 0
        parameter.register_hook(lambda g: g * math.nan if self.now in self.steps else g)

    def on_step_begin(self, args, state, control, **kwargs):
        self.now = state.global_step + 1


@outcome(
    "NaN or Inf in a gradient", "the step is skipped and counted; no weight and no moment changes"
)
def test_non_finite_step_is_skipped_and_counted(tiny_moe, tokenizer, tmp_path):
    trainer = make_trainer(tiny_moe, tokenizer, tmp_path, max_steps=4, max_grad_norm=1.0)
    trainer.add_callback(_Poison(trainer.model.lm_head.weight, {2}))
    snapshots = {}

    class _Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            snapshots[state.global_step] = weights(model)

    trainer.add_callback(_Watch())
    trainer.train()
    for name, tensor in snapshots[1].items():
        assert torch.equal(tensor, snapshots[2][name]), name
    assert not torch.equal(snapshots[2]["lm_head.weight"], snapshots[3]["lm_head.weight"])
    assert all(torch.isfinite(t).all() for t in weights(trainer.model).values())
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [r["skipped_steps"] for r in records] == [0, 1, 1, 1]
    assert records[1]["grad_norm"] == "nan"


@outcome(
    "NaN or Inf in three steps in a row (`--max_bad_steps`)",
    "exit code 1; the weights are finite and the last checkpoint is whole",
)
def test_three_bad_steps_in_a_row_stop_the_run(tiny_moe, tokenizer, tmp_path):
    trainer = make_trainer(tiny_moe, tokenizer, tmp_path, max_steps=9)
    trainer.add_callback(_Poison(trainer.model.lm_head.weight, {3, 4, 5, 6}))
    with pytest.raises(NonFiniteError, match=r"steps 3 to 5 .*--max_bad_steps"):
        trainer.train()
    assert all(torch.isfinite(t).all() for t in weights(trainer.model).values())


def test_evaluation_is_exact_per_token(tiny_moe, tokenizer, tmp_path):
    held_out = Documents(7, len(tokenizer), seed=5)
    trainer = make_trainer(
        tiny_moe, tokenizer, tmp_path, eval_documents=held_out, per_device_eval_batch_size=2
    )
    metrics = trainer.evaluate()
    with torch.no_grad():
        total, count = nll_sum(tiny_moe, held_out)
    assert metrics["eval_label_tokens"] == count
    assert metrics["eval_loss"] == pytest.approx((total / count).item(), rel=1e-5)
    assert trainer.model.training


def test_evaluation_tells_the_sources_apart(tiny_moe, tokenizer, tmp_path, caplog):
    caplog.set_level("INFO")
    sources = {name: Documents(7, len(tokenizer), seed=n) for n, name in enumerate(("a", "b"))}
    trainer = make_trainer(tiny_moe, tokenizer, tmp_path, eval_documents=sources)
    metrics = trainer.evaluate()
    with torch.no_grad():
        sums = {name: nll_sum(tiny_moe, documents) for name, documents in sources.items()}
    for name, (total, count) in sums.items():
        assert metrics[f"eval_{name}_label_tokens"] == count
        assert metrics[f"eval_{name}_loss"] == pytest.approx((total / count).item(), rel=1e-5)
    count = sum(count for _, count in sums.values())
    total = sum(total.item() for total, _ in sums.values())
    assert metrics["eval_label_tokens"] == count
    assert metrics["eval_loss"] == pytest.approx(total / count, rel=1e-5)
    assert f"eval_b loss {metrics['eval_b_loss']:.4f}" in caplog.text
    assert (
        trainer.evaluate(sources and trainer.eval_dataset["a"])["eval_label_tokens"] == sums["a"][1]
    )


def test_metrics_file_has_the_contracted_keys(tiny_moe, tokenizer, tmp_path):
    documents = Documents(10, len(tokenizer))
    trainer = make_trainer(tiny_moe, tokenizer, tmp_path, documents=documents, num_train_epochs=1)
    trainer.train()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert all(tuple(record) == KEYS for record in records)
    assert [r["step"] for r in records] == list(range(1, trainer.state.max_steps + 1))
    assert sum(r["tokens"] for r in records) == documents.lengths.sum()
    assert all(r["mfu"] is None and r["model_tflops_per_gpu"] > 0 for r in records)
    assert all(1 <= r["expert_load_max_over_mean"] <= 8 for r in records)


def test_epochs_use_every_document_once_in_another_order(tiny_moe, tokenizer, tmp_path):
    documents = Documents(10, len(tokenizer))
    trainer = make_trainer(tiny_moe, tokenizer, tmp_path, documents=documents, num_train_epochs=3)
    orders = []

    class _Orders(TrainerCallback):
        def on_epoch_end(self, args, state, control, **kwargs):
            rows = trainer.train_dataset
            orders.append([i for r in range(len(rows)) for i in rows.documents_of(r).tolist()])

    trainer.add_callback(_Orders())
    trainer.train()
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3


@outcome("NaN or Inf in the loss", "the step is skipped, counted and logged with its true value")
def test_a_nan_loss_is_told_once_and_not_for_ever(tiny_moe, tokenizer, tmp_path):
    class _Bad(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            factor[0] = math.nan if state.global_step == 1 else 1.0

    factor = [1.0]
    trainer = make_trainer(tiny_moe, tokenizer, tmp_path, max_steps=4, callbacks=(_Bad(),))
    trainer.model.lm_head.register_forward_hook(lambda *call: call[2] * factor[0])
    trainer.train()
    losses = [h["loss"] for h in trainer.state.log_history if "loss" in h]
    assert [math.isnan(loss) for loss in losses] == [False, True, False, False]
    assert trainer.metrics.totals.skipped_steps == 1


def test_the_last_step_is_recorded_whatever_the_interval(tiny_moe, tokenizer, tmp_path):
    trainer = make_trainer(tiny_moe, tokenizer, tmp_path, max_steps=3, logging_steps=10)
    trainer.train()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [record["step"] for record in records] == [3]

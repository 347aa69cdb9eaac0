import json
import math
from functools import partial

import pytest
import torch
from torchao.optim import AdamW8bit, AdamWFp8
from transformers import Adafactor, TrainerCallback

from qwen3_sft.errors import NonFiniteError
from qwen3_sft.optimizers import adafactor as adafactor_step
from qwen3_sft.optimizers.in_backward import BackwardOptimizer
from tests.support.oracle import assert_close
from tests.support.training import make_trainer, weights

IN_BACKWARD = {"optimizer_in_backward": True, "clip": "per_tensor"}
LOW_BIT = {"optim": "adamw_torch_8bit", "optim_args": "bf16_stochastic_round=True"}
ADAFACTOR = partial(Adafactor, scale_parameter=False, relative_step=False)
SCHEDULE = {
    "max_steps": 4, "weight_decay": 0.1, "warmup_steps": 2, "lr_scheduler_type": "cosine",
    "aux": 0.01,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _eager():
    # torchao compiles its step for each shape, 13 seconds for the first on two cores; the
    # classic steps compared with run the same operations eagerly.
    with torch.compiler.set_stance("force_eager"):
        yield


class _Snapshots(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.steps.append(weights(model))


def run(model, tokenizer, folder, **arguments):
    snapshots = _Snapshots()
    trainer = make_trainer(model, tokenizer, folder, callbacks=(snapshots,), **arguments)
    trainer.train()
    return trainer, snapshots.steps


def records_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


# ---- the same as the step after the backward pass ----


@pytest.mark.parametrize(
    "arguments",
    [
        {"optim": "adamw_torch"},
        {"optim": "adamw_torch_fused"},
        {"optim": "adamw_torch_8bit"},
        {"optim": "adamw_torch_8bit", "optim_args": "states=fp8"},
        {"optim": "adamw_torch", "activation_checkpointing": "full"},
        {"optim": "adamw_torch", "activation_checkpointing": "selective"},
    ],
)  # fmt: skip
def test_each_step_equals_the_classic_one_bit_by_bit(tiny_moe, tokenizer, tmp_path, arguments):
    classic, expected = run(tiny_moe, tokenizer, tmp_path / "a", **SCHEDULE, **arguments)
    fused, found = run(
        tiny_moe, tokenizer, tmp_path / "b", optimizer_in_backward=True, **SCHEDULE, **arguments
    )
    assert len(expected) == len(found) == 4
    for step, (a, b) in enumerate(zip(expected, found, strict=True), 1):
        for name in a:
            assert torch.equal(a[name], b[name]), (step, name)
    assert not torch.equal(expected[2]["lm_head.weight"], expected[3]["lm_head.weight"])
    for a, b in zip(records_of(tmp_path / "a"), records_of(tmp_path / "b"), strict=True):
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-5)
        assert b["learning_rate"] == a["learning_rate"]
    groups = classic.optimizer.param_groups, fused.optimizer.param_groups
    assert [g["weight_decay"] for g in groups[0]] == [g["weight_decay"] for g in groups[1]]


def test_adafactor_in_slices_equals_transformers_own(tiny_moe, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(adafactor_step, "SLICE", 1 << 12)  # a few rows or experts at a time
    arguments = {**SCHEDULE, "optim": "adafactor"}
    classic, expected = run(tiny_moe, tokenizer, tmp_path, **arguments)
    fused, found = run(tiny_moe, tokenizer, tmp_path, optimizer_in_backward=True, **arguments)
    for name, tensor in expected[-1].items():
        assert not torch.equal(tensor, expected[1][name]), name
        assert_close(found[-1][name], tensor, name=name)
    states = [trainer.optimizer.state_dict()["state"] for trainer in (classic, fused)]
    for number, state in states[0].items():
        assert state.keys() == states[1][number].keys()


def test_tied_embeddings_are_updated_once_after_both_uses(tiny_moe, tokenizer, tmp_path):
    tiny_moe.config.tie_word_embeddings = True
    tiny_moe.lm_head.weight = tiny_moe.model.embed_tokens.weight
    results = [
        run(tiny_moe, tokenizer, tmp_path, optim="adamw_torch", **SCHEDULE, **more)
        for more in ({}, {"optimizer_in_backward": True})
    ]
    trainer, steps = results[1]
    assert trainer.model.lm_head.weight is trainer.model.model.embed_tokens.weight
    for name, tensor in results[0][1][-1].items():
        assert torch.equal(tensor, steps[-1][name]), name


def test_never_more_than_one_gradient_at_a_time(tiny_moe, tokenizer, tmp_path):
    trainer = make_trainer(tiny_moe, tokenizer, tmp_path, max_steps=2, **IN_BACKWARD)
    parameters = list(trainer.model.parameters())
    alive, at_end = [], []

    def count(_):
        alive.append(sum(p.grad is not None for p in parameters))

    for parameter in parameters:  # registered first, so called before the update
        parameter.register_post_accumulate_grad_hook(count)

    class _AtEnd(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            at_end.append(sum(p.grad is not None for p in parameters))

    trainer.add_callback(_AtEnd())
    trainer.train()
    assert alive == [1] * 2 * len(parameters)
    assert at_end == [0, 0]


def test_a_second_backward_in_one_step_is_an_error():
    model = torch.nn.Linear(4, 3)
    BackwardOptimizer(model, torch.optim.AdamW(model.parameters()), clip="global", max_grad_norm=0)
    model(torch.ones(2, 4)).sum().backward()
    with pytest.raises(RuntimeError, match=r"second gradient of (weight|bias) .* one backward"):
        model(torch.ones(2, 4)).sum().backward()


def test_detached_it_is_the_classic_optimizer():
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    BackwardOptimizer(model, optimizer, clip="global", max_grad_norm=0).detach()
    model(torch.ones(2, 4)).sum().backward()
    assert model.weight.grad is not None
    assert not optimizer.state


# ---- clip ----


class _Gradients:
    """A model whose gradients are whatever the test says."""

    def __init__(self, optimizer_class, clip, dtype=torch.float32):
        self.model = torch.nn.ParameterDict(
            {"a": torch.zeros(30, 40, dtype=dtype), "b": torch.zeros(50, dtype=dtype)}
        )
        self.optimizer = optimizer_class(self.model.parameters(), lr=1e-3, weight_decay=0.0)
        self.step_in_backward = BackwardOptimizer(
            self.model, self.optimizer, clip=clip, max_grad_norm=1.0
        )

    def step(self, **gradients):
        sum((self.model[n] * g).sum() for n, g in gradients.items()).backward()
        norm = self.step_in_backward.norm().item()
        return norm, self.step_in_backward.end_step(norm)

    def first_moment(self, name):
        return self.optimizer.state[self.model[name]]["exp_avg"].double()


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, AdamW8bit])
@pytest.mark.parametrize("clip", ["per_tensor", "delayed"])
def test_clip_equals_a_float64_reference(optimizer_class, clip):
    case = _Gradients(optimizer_class, clip)
    shapes = {name: tensor.shape for name, tensor in case.model.items()}
    total = sum(shape.numel() for shape in shapes.values())
    moments = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    previous = None
    for size in (0.001, 5.0, 0.3, 40.0):
        gradients = {n: size * torch.randn(s) for n, s in shapes.items()}
        exact = {n: g.double() for n, g in gradients.items()}
        norm = math.sqrt(sum(g.square().sum().item() for g in exact.values()))
        for name, gradient in exact.items():
            limit = math.sqrt(gradient.numel() / total)
            scale = limit / gradient.norm().item()
            if clip == "delayed" and previous is not None:
                scale = 1 / previous
            moments[name].lerp_(gradient * min(1.0, scale), 0.1)
        assert case.step(**gradients)[0] == pytest.approx(norm, rel=1e-6)
        previous = norm
        for name, moment in moments.items():
            torch.testing.assert_close(case.first_moment(name), moment, rtol=1e-5, atol=1e-6)


def test_per_tensor_clip_bounds_the_global_norm():
    case = _Gradients(torch.optim.AdamW, "per_tensor")
    case.step(a=torch.full((30, 40), 1e3), b=torch.full((50,), 1e6))
    applied = torch.cat([10 * case.first_moment(name).flatten() for name in "ab"])  # beta1 is 0.9
    assert applied.norm().item() == pytest.approx(1.0, rel=1e-5)


# ---- gradients that are not finite ----


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, AdamW8bit, AdamWFp8, ADAFACTOR])
@pytest.mark.parametrize("clip", ["per_tensor", "delayed"])
def test_a_bad_tensor_enters_neither_weights_nor_moments(optimizer_class, clip, bad):
    case = _Gradients(optimizer_class, clip)
    case.step(a=torch.ones(30, 40), b=torch.ones(50))
    before = {name: tensor.detach().clone() for name, tensor in case.model.items()}
    gradient = torch.ones(30, 40)
    gradient[3, 4] = bad
    norm, names = case.step(a=gradient, b=torch.ones(50))
    assert not math.isfinite(norm)
    assert names == ["a"]
    assert not torch.equal(case.model["b"], before["b"])
    if optimizer_class is not torch.optim.AdamW:  # not fused: moves by its momentum
        assert torch.equal(case.model["a"], before["a"])
    states = case.optimizer.state[case.model["a"]].values()
    assert all(torch.as_tensor(state).isfinite().all() for state in states)
    norm, names = case.step(a=torch.ones(30, 40), b=torch.ones(50))
    assert norm == pytest.approx(math.sqrt(1250), rel=1e-6)
    assert names == []
    assert all(tensor.isfinite().all() for tensor in case.model.values())


class _Poison(TrainerCallback):
    def __init__(self, parameter, steps):
        self.steps, self.now = steps, 0
        parameter.register_hook(lambda g: g * math.nan if self.now in self.steps else g)

    def on_step_begin(self, args, state, control, **kwargs):
        self.now = state.global_step + 1


@pytest.mark.parametrize("optim", ["adamw_torch_8bit", "adamw_torch_fused"])
def test_bad_step_is_counted_and_the_bad_weight_kept(tiny_moe, tokenizer, tmp_path, optim, caplog):
    snapshots = _Snapshots()
    trainer = make_trainer(
        tiny_moe, tokenizer, tmp_path, max_steps=4, max_grad_norm=1.0, optim=optim,
        callbacks=(snapshots,), **IN_BACKWARD,
    )  # fmt: skip
    trainer.add_callback(_Poison(trainer.model.lm_head.weight, {2}))
    with caplog.at_level("WARNING", logger="qwen3_sft"):
        trainer.train()
    first, second, third = snapshots.steps[:3]
    assert torch.equal(first["lm_head.weight"], second["lm_head.weight"])
    assert not torch.equal(second["lm_head.weight"], third["lm_head.weight"])
    assert not torch.equal(first["model.norm.weight"], second["model.norm.weight"])
    assert all(tensor.isfinite().all() for tensor in snapshots.steps[3].values())
    records = records_of(tmp_path)
    assert [r["skipped_steps"] for r in records] == [0, 1, 1, 1]
    assert records[1]["grad_norm"] == "nan"
    assert "1 weights had a non-finite gradient" in caplog.text
    assert "lm_head.weight" in caplog.text


def test_bad_steps_in_a_row_stop_the_run_and_say_what_was_updated(tiny_moe, tokenizer, tmp_path):
    trainer = make_trainer(tiny_moe, tokenizer, tmp_path, max_steps=9, **IN_BACKWARD)
    trainer.add_callback(_Poison(trainer.model.lm_head.weight, {3, 4, 5}))
    with pytest.raises(NonFiniteError, match="own gradient was finite were updated"):
        trainer.train()


# ---- resume ----


@pytest.mark.parametrize(
    ("clip", "optimizer"),
    [("per_tensor", LOW_BIT), ("delayed", LOW_BIT), ("per_tensor", {"optim": "adafactor"})],
)
def test_resume_is_bit_exact_with_stochastic_rounding(
    tiny_moe, tokenizer, tmp_path, clip, optimizer
):
    arguments = {
        **optimizer, **SCHEDULE, "optimizer_in_backward": True, "clip": clip, "max_grad_norm": 0.5,
        "save_strategy": "steps", "save_steps": 2,
    }  # fmt: skip
    model = tiny_moe.to(torch.bfloat16)
    _, whole = run(model, tokenizer, tmp_path, **arguments)
    torch.manual_seed(99)  # of a new process: nothing may depend on it
    snapshots = _Snapshots()
    resumed = make_trainer(model, tokenizer, tmp_path, callbacks=(snapshots,), **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len(snapshots.steps) == 2
    for found, expected in zip(snapshots.steps, whole[2:], strict=True):
        for name, tensor in expected.items():
            assert tensor.dtype == torch.bfloat16
            assert torch.equal(found[name], tensor), name


def test_stochastic_rounding_depends_on_the_generator():
    results = []
    for seed in (1, 1, 2):
        case = _Gradients(
            lambda p, **k: AdamW8bit(p, bf16_stochastic_round=True, **k), "per_tensor",
            torch.bfloat16,
        )  # fmt: skip
        torch.manual_seed(seed)
        for _ in range(2):
            case.step(a=torch.ones(30, 40, dtype=torch.bfloat16), b=torch.ones(50).bfloat16())
        results.append(case.model["a"].detach().clone())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_lost_updates_are_in_the_record(tiny_moe, tokenizer, tmp_path):
    run(tiny_moe.to(torch.bfloat16), tokenizer, tmp_path, **LOW_BIT, **SCHEDULE, **IN_BACKWARD)
    records = records_of(tmp_path)
    assert all(0 <= r["lost_update_fraction"] <= 1 for r in records[1:])

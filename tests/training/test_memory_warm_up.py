import copy
import json
import math
import random
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchao.optim import AdamW4bit, AdamW8bit, AdamWFp8
from transformers import Adafactor, TrainerCallback

from qwen3_sft.optimizers.adafactor import SlicedAdafactor
from qwen3_sft.optimizers.in_backward import BackwardOptimizer
from qwen3_sft.optimizers.low_bit_step import LowBitStep
from qwen3_sft.training.memory_warm_up import zero_states
from tests.support.training import ROW, Documents, make_trainer, weights

SCHEDULE = {
    "max_steps": 3, "weight_decay": 0.1, "warmup_steps": 0, "lr_scheduler_type": "cosine",
    "aux": 0.01, "max_grad_norm": 0.5,
}  # fmt: skip
LOW_BIT = {"optim": "adamw_torch_8bit", "optim_args": "bf16_stochastic_round=True"}
ADAFACTOR = partial(Adafactor, scale_parameter=False, relative_step=False)
IN_BACKWARD = {"optimizer_in_backward": True, "clip": "delayed"}
# What a clock or the process's memory decides.
_PHYSICAL = {
    "step_time_s", "tokens_per_second_per_gpu", "model_tflops_per_gpu", "peak_memory_gib",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _eager():
    # torchao compiles its step for each shape, 13 seconds for the first on two cores.
    with torch.compiler.set_stance("force_eager"):
        yield


def with_dropout(model):
    """Draw from every generator in each forward pass; the model's own dropouts are patched away."""

    def noise(module, _, output):
        random.random(), np.random.rand()
        return F.dropout(output, 0.1, module.training)

    model.model.embed_tokens.register_forward_hook(noise)
    return model.eval()


def random_state():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


class _AtFirstStep(TrainerCallback):
    """What a run has when its first step begins."""

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if not hasattr(self, "weights"):
            self.random = random_state()
            self.weights = weights(model)
            self.gradients = [p.grad for p in model.parameters() if p.grad is not None]
            self.states = sum(map(len, optimizer.optimizer.state.values()))
            self.is_training = model.training


def train(model, tokenizer, folder, *, warm_up, resume=None, at_load=None, **arguments):
    at_first = _AtFirstStep()
    trainer = make_trainer(
        model, tokenizer, folder, callbacks=(at_first,), memory_warm_up=warm_up,
        **(SCHEDULE | arguments),
    )  # fmt: skip
    if at_load is not None:
        trainer.create_optimizer().register_load_state_dict_pre_hook(at_load)
    torch.manual_seed(5)
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return trainer, at_first


def flat(value):
    """Every tensor and number of an optimizer's state, torchao's codes and scales among them."""
    if hasattr(value, "codes"):
        return [value.codes.view(torch.uint8), value.scale]
    if isinstance(value, dict):
        return [leaf for key in sorted(value, key=str) for leaf in flat(value[key])]
    return [leaf for v in value for leaf in flat(v)] if isinstance(value, list) else [value]


def assert_same_bits(found, expected):
    for a, b in zip(flat(found), flat(expected), strict=True):
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
        else:
            assert a == b


def records_of(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").open())
    return [{k: v for k, v in line.items() if k not in _PHYSICAL} for line in lines]


def assert_same_run(one, other):
    (trainer, first), (other_trainer, other_first) = one, other
    assert first.random == other_first.random
    assert first.is_training == other_first.is_training
    assert first.gradients == other_first.gradients == []
    assert_same_bits(first.weights, other_first.weights)
    assert_same_bits(weights(trainer.model), weights(other_trainer.model))
    for part in ("optimizer", "lr_scheduler"):
        found, expected = (getattr(t, part).state_dict() for t in (trainer, other_trainer))
        assert_same_bits(found, expected)
    assert (
        trainer.state.log_history[-1]["total_flos"]
        == (other_trainer.state.log_history[-1]["total_flos"])
    )
    assert trainer.current_flos == other_trainer.current_flos


@pytest.mark.parametrize(
    ("dtype", "arguments"),
    [
        (torch.float32, {"optim": "adamw_torch", "gradient_accumulation_steps": 2}),
        (torch.float32, {"optim": "adafactor", "activation_checkpointing": "full"}),
        (torch.bfloat16, LOW_BIT),
        (torch.bfloat16, LOW_BIT | IN_BACKWARD),
        (torch.bfloat16, {"optim": "adafactor"} | IN_BACKWARD),
        (torch.float32, {"optim": "adamw_torch_fused", "bf16": True} | IN_BACKWARD),
        (torch.float32, {"optim": "sgd"}),
    ],
)
def test_a_run_is_the_same_bit_by_bit(tiny_moe, tokenizer, tmp_path, dtype, arguments, caplog):
    model = with_dropout(tiny_moe.to(dtype))
    evaluates = {
        "eval_documents": Documents(3, len(tokenizer), seed=9), "eval_strategy": "steps",
        "eval_steps": 2, "per_device_train_batch_size": 2,
    }  # fmt: skip
    runs = []
    for warm_up in (None, True):  # None: on a GPU only
        with caplog.at_level("INFO", logger="qwen3_sft"):
            caplog.clear()
            runs.append(
                train(
                    model, tokenizer, tmp_path / str(warm_up), warm_up=warm_up,
                    **evaluates, **arguments,
                )
            )  # fmt: skip
        assert ("memory warm-up: peak" in caplog.text) == bool(warm_up)
    assert_same_run(*runs)
    assert records_of(tmp_path / "True") == records_of(tmp_path / "None")
    assert runs[0][1].states == 0
    is_known = arguments["optim"] != "sgd"
    assert (runs[1][1].states > 0) == is_known
    assert ("without the update of SGD" in caplog.text) != is_known


@pytest.mark.parametrize("optimizer", [{"optim": "adamw_torch"}, LOW_BIT | IN_BACKWARD])
def test_a_resumed_run_is_the_same_bit_by_bit(tiny_moe, tokenizer, tmp_path, optimizer, caplog):
    dtype = torch.bfloat16 if "optim_args" in optimizer else torch.float32
    model, saves = with_dropout(tiny_moe.to(dtype)), {"save_strategy": "steps", "save_steps": 2}
    whole, first = train(model, tokenizer, tmp_path, warm_up=False, **optimizer, **saves)
    states_at_load = []
    with caplog.at_level("INFO", logger="qwen3_sft"):
        resumed, at_resume = train(
            model, tokenizer, tmp_path, warm_up=True, resume=tmp_path / "checkpoint-2",
            at_load=lambda optimizer, _: states_at_load.append(len(optimizer.state)),
            **optimizer, **saves,
        )  # fmt: skip
    assert caplog.text.count("memory warm-up: peak") == 1
    assert "without" not in caplog.text
    # Old and loaded ones never exist together; accelerate loads once to move them.
    assert states_at_load == [0, 0]
    assert at_resume.states == len(list(model.parameters())) * 3
    assert not torch.equal(first.weights["lm_head.weight"], at_resume.weights["lm_head.weight"])
    assert_same_bits(weights(resumed.model), weights(whole.model))
    assert_same_bits(resumed.optimizer.state_dict(), whole.optimizer.state_dict())
    assert resumed.lr_scheduler.state_dict() == whole.lr_scheduler.state_dict()


def test_the_largest_batch_and_the_gradients_of_the_one_before_are_there(
    tiny_moe, tokenizer, tmp_path
):
    seen = []

    class _Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            parameters = list(model.parameters())

            def look(module, args, kwargs):
                states = trainer.optimizer.optimizer.state
                seen.append(
                    (
                        module.training,
                        kwargs["input_ids"].shape[1],
                        len(kwargs["label_positions"]),
                        sum(p.grad is not None for p in parameters),
                        sum(map(len, states.values())),
                    )
                )

            self.handle = model.register_forward_pre_hook(look, with_kwargs=True)

        def on_epoch_begin(self, args, state, control, **kwargs):
            self.handle.remove()

    trainer = make_trainer(
        tiny_moe, tokenizer, tmp_path, memory_warm_up=True, max_steps=1, optim="adamw_torch",
        per_device_train_batch_size=2, gradient_accumulation_steps=3,
        per_device_eval_batch_size=3, eval_documents=Documents(3, len(tokenizer)),
        eval_strategy="steps", eval_steps=5,
    )  # fmt: skip
    trainer.callback_handler.callbacks.insert(0, _Watch())
    trainer.train()
    count = len(list(trainer.model.parameters()))
    row = (ROW, ROW - 1)
    assert seen == [
        (True, 2 * row[0], 2 * row[1], 0, 3 * count),
        (True, 2 * row[0], 2 * row[1], count, 3 * count),
        (False, 3 * row[0], 3 * row[1], 0, 3 * count),
    ]


def test_in_the_backward_pass_gradients_never_exist_together(tiny_moe, tokenizer, tmp_path):
    trainer = make_trainer(
        tiny_moe, tokenizer, tmp_path, memory_warm_up=True, max_steps=1, **LOW_BIT, **IN_BACKWARD
    )
    parameters, alive = list(trainer.model.parameters()), []
    update = LowBitStep.__call__

    def count(self, *args):
        alive.append(sum(p.grad is not None for p in parameters))
        update(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LowBitStep, "__call__", count)
        trainer.train()
    # States, the backward pass of the warm-up, that of the step.
    assert alive == [1] * 3 * len(parameters)


@pytest.mark.parametrize("value", [1.0, math.inf])
@pytest.mark.parametrize("optimizer_class", [AdamW8bit, ADAFACTOR])
def test_a_rehearsed_update_changes_no_weight_at_any_learning_rate(optimizer_class, value):
    model = torch.nn.Linear(64, 128)
    before = copy.deepcopy(model.state_dict())
    optimizer = optimizer_class(model.parameters(), lr=1.0, weight_decay=0.1)
    in_backward = BackwardOptimizer(model, optimizer, clip="per_tensor", max_grad_norm=1.0)
    with in_backward.rehearsal():
        in_backward.update_all()
        (value * model(torch.ones(2, 64))).sum().backward()
        (value * model(torch.ones(2, 64))).sum().backward()
    assert_same_bits(model.state_dict(), before)
    assert in_backward.norm() == 0
    assert optimizer.state[model.weight]["step"] == 3
    model(torch.ones(2, 64)).sum().backward()
    assert not torch.equal(model.weight, before["weight"])


@pytest.mark.parametrize(
    "optimizer_class",
    [
        partial(torch.optim.AdamW, fused=True),
        torch.optim.Adafactor,
        ADAFACTOR,
        partial(SlicedAdafactor, scale_parameter=False, relative_step=False),
        AdamW8bit,
        AdamWFp8,
        AdamW4bit,
    ],
)
def test_states_set_to_zero_are_those_of_a_fresh_optimizer(optimizer_class):
    results = []
    for steps_before in (0, 2):
        torch.manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(64, 128)), torch.nn.Parameter(torch.randn(3))]
        start = [p.detach().clone() for p in weights]
        optimizer = optimizer_class(weights, lr=1e-2)
        for step in range(steps_before + 2):
            if step == steps_before:
                zero_states(optimizer)
                for parameter, value in zip(weights, start, strict=True):
                    parameter.data.copy_(value)
            for number, parameter in enumerate(weights):
                torch.manual_seed(10 * (step - steps_before) + number)
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        results.append([weights, optimizer.state_dict()["state"]])
    assert_same_bits(results[1], results[0])

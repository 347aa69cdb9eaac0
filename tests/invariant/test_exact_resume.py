"""A resumed run equals the uninterrupted one bit by bit: the cases of shared/reliability.md, 2.

Runs on several processes are compared in tests/distributed, killed ones in tests/faults.
"""

import copy
import dataclasses

import pytest
import torch
from transformers import set_seed

from tests.support.training import PATCHES, Documents, make_trainer, weights

BASE = {"num_train_epochs": 2, "save_strategy": "steps", "save_total_limit": 9, "aux": 0.01}
ACCUMULATED = {"gradient_accumulation_steps": 2}
SCHEDULE = {"lr_scheduler_type": "cosine", "warmup_steps": 2, "max_grad_norm": 1.0}
WORKERS = {"dataloader_num_workers": 2}

# name -> (options, step of the checkpoint, packing). 24 documents make 9 rows of 64 tokens.
CASES = {
    "mid_epoch": ({}, 4, True),
    "last_step_but_one": ({}, -1, True),
    "epoch_end": ({}, 0.5, True),
    "second_epoch": ({}, 0.75, True),
    "accumulated": (ACCUMULATED, 2, True),
    "accumulated_five_with_a_remainder": ({"gradient_accumulation_steps": 5}, 1, True),
    "accumulated_second_epoch": (ACCUMULATED, 0.75, True),
    "several_rows": ({"per_device_train_batch_size": 2}, 2, True),
    "no_packing": ({"max_steps": 12}, 5, False),
    "workers": (WORKERS, 4, True),
    "workers_that_prefetch": (WORKERS | {"dataloader_prefetch_factor": 4}, 0.75, True),
    "dropout": ({"dropout": 0.1}, 4, True),
    "dropout_accumulated_second_epoch": ({"dropout": 0.1} | ACCUMULATED, 0.75, True),
    "dropout_workers": ({"dropout": 0.1} | WORKERS, 4, True),
    "neftune": ({"neftune_noise_alpha": 5.0}, 4, True),
    "cosine_and_clip": (SCHEDULE, 4, True),
    "bf16_autocast": ({"bf16": True}, 4, True),
    "bf16_weights": ({}, 4, True),
    "mixture": ({"repeats": (1.5, 0.4)}, 0.75, True),
    "adafactor": ({"optim": "adafactor"}, 4, True),
}


@pytest.mark.parametrize("name", CASES)
def test_resume_is_exact(name, tiny_moe, tokenizer, tmp_path, monkeypatch):
    options, step, packing = CASES[name]
    options = dict(options)
    patches = PATCHES
    if "dropout" in options:  # which the varlen kernels do not have
        tiny_moe.config.attention_dropout = options.pop("dropout")
        patches = tuple(p for p in PATCHES if p != "varlen_attention")
        for layer in tiny_moe.model.layers:
            layer.self_attn.attention_dropout = tiny_moe.config.attention_dropout
    if name == "bf16_weights":
        tiny_moe.to(torch.bfloat16)

    def trainer(folder, **more):
        set_seed(1)
        return make_trainer(
            tiny_moe, tokenizer, folder, patches=patches, packing=packing,
            documents=Documents(24, len(tokenizer)), **BASE | options | more,
        )  # fmt: skip

    total = num_steps(trainer(tmp_path / "count"))
    step = step if step >= 1 else total + step if step < 0 else round(step * total)
    whole = trainer(tmp_path, save_steps=step)
    whole.train()
    assert whole.state.global_step == total > step
    for again in range(2 if name == "mid_epoch" else 1):  # the same checkpoint serves again
        torch.manual_seed(again + 17)
        resumed = trainer(tmp_path, save_steps=step)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert counters(resumed) == counters(whole)
        final = weights(whole.model)
        for key, tensor in weights(resumed.model).items():
            assert torch.equal(tensor, final[key]), key


def num_steps(trainer):
    args, rows = trainer.args, len(trainer.train_dataset)
    rows_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
    assert rows % rows_per_step == 0
    return args.max_steps if args.max_steps > 0 else 2 * rows // rows_per_step


def counters(trainer):
    """Everything that a run has counted or logged at its end."""
    history = copy.deepcopy(trainer.state.log_history)
    records = [
        {k: v for k, v in entry.items() if k in ("step", "loss", "grad_norm", "learning_rate")}
        for entry in history
        if "loss" in entry
    ]
    return {
        "records": records, "flops": trainer.state.total_flos, "epoch": trainer.state.epoch,
        **dataclasses.asdict(trainer.metrics.totals),
    }  # fmt: skip

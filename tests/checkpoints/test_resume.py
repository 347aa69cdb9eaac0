import logging

import pytest
import torch

from qwen3_sft.checkpoints.resume import CHANGEABLE, check_allowed, check_resumable, run_identity
from qwen3_sft.errors import CheckpointError, UsageError
from qwen3_sft.model.fingerprint import model_fingerprint
from qwen3_sft.options.recipe import parse_options
from tests.support.training import make_trainer

OPTIONS = parse_options(["--model_name_or_path", "m", "--dataset", "d", "--max_steps", "8"])
FINGERPRINTS = {"data": "d", "template": "t", "tokenizer": "k"}
IDENTITY = run_identity(OPTIONS, FINGERPRINTS, "base", "float32", 4)
MANIFEST = {
    "layout": "dtensor", "world_size": 2, "save_only_model": False, "identity": IDENTITY,
}  # fmt: skip


@pytest.mark.parametrize(
    ("manifest", "layout", "world_size", "message"),
    [
        ({"layout": "zero"}, "dtensor", 2, "saved under DeepSpeed ZeRO, this run uses FSDP2"),
        ({}, "whole", 2, r"saved under FSDP2 .*, this run uses one process or DDP"),
        ({"layout": "zero"}, "zero", 3, "saved by 2 processes, there are 3"),
        ({"save_only_model": True}, "dtensor", 2, "--save_only_model true and holds no optimizer"),
    ],
)
def test_what_this_run_cannot_read_is_refused(manifest, layout, world_size, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        check_resumable(MANIFEST | manifest, layout, world_size, tmp_path, IDENTITY)


@pytest.mark.parametrize("name", CHANGEABLE)
def test_a_change_is_refused_by_name_unless_it_is_allowed(name, tmp_path, caplog):
    now = IDENTITY | {name: "other"}
    with pytest.raises(CheckpointError) as caught:
        check_resumable(MANIFEST, "dtensor", 2, tmp_path, now, [n for n in CHANGEABLE if n != name])
    assert f"{name} {IDENTITY[name]} -> other." in str(caught.value)
    assert f"--allow_change {name}:" in str(caught.value)
    with caplog.at_level(logging.WARNING, logger="qwen3_sft"):
        check_resumable(MANIFEST, "dtensor", 2, tmp_path, now, [name])
    assert f"another {name} {IDENTITY[name]} -> other" in caplog.text


@pytest.mark.parametrize("name", ["base", "dtype", "optim", "optim_args", "optimizer_in_backward"])
def test_what_states_are_made_of_cannot_be_changed(name, tmp_path):
    with pytest.raises(CheckpointError, match=f"{name} .* -> other. .* made of the old ones"):
        check_resumable(
            MANIFEST, "dtensor", 2, tmp_path, IDENTITY | {name: "other"}, [*CHANGEABLE, name]
        )


@pytest.mark.parametrize("steps", [4, 16])
def test_another_length_is_taken_and_said(steps, tmp_path, caplog):
    check_resumable(MANIFEST, "dtensor", 2, tmp_path, IDENTITY | {"max_steps": steps})
    assert f"max_steps 8 -> {steps}; from the next step on the learning rate is" in caplog.text


@pytest.mark.parametrize("kind", ["reduce_lr_on_plateau", "greedy"])
@pytest.mark.parametrize("change", [{"max_steps": 16}, {"learning_rate": 2.0}])
def test_a_rate_that_follows_from_all_steps_before_cannot_change(kind, change, tmp_path):
    identity = IDENTITY | {"lr_scheduler_type": kind}
    with pytest.raises(CheckpointError, match=f"lr_scheduler_type {kind} the learning rate"):
        check_resumable(
            MANIFEST | {"identity": identity}, "dtensor", 2, tmp_path, identity | change, CHANGEABLE
        )


def test_what_this_run_goes_on_from_is_not_refused(tmp_path):
    check_resumable(MANIFEST, "dtensor", 2, tmp_path, IDENTITY)
    check_resumable(MANIFEST, "dtensor", 4, tmp_path, IDENTITY)  # shards load on any number


def test_a_manifest_without_identity_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="does not say what it was trained on"):
        check_resumable(
            {k: v for k, v in MANIFEST.items() if k != "identity"}, "dtensor", 2, tmp_path, IDENTITY
        )


def test_a_name_that_means_nothing_is_told():
    check_allowed(CHANGEABLE)
    with pytest.raises(
        UsageError, match="--allow_change lr: must be among global_batch_size, data"
    ):
        check_allowed(["seed", "lr"])


def test_the_number_of_processes_is_no_change_of_the_optimizer():
    alone = OPTIONS.replaced(optim="adamw_torch_8bit", optim_args="bf16_stochastic_round=True")
    several = OPTIONS.replaced(optim="adamw_torch_8bit")
    assert (
        run_identity(alone, {}, "b", "bfloat16", 4)["optim_args"]
        == (run_identity(several, {}, "b", "bfloat16", 4)["optim_args"])
    )


def test_a_base_model_is_known_by_its_weights_wherever_it_lies(tiny_moe, tmp_path):
    for name in ("one", "moved", "other"):
        tiny_moe.save_pretrained(tmp_path / name)
        if name == "moved":
            with torch.no_grad():
                tiny_moe.model.layers[1].mlp.gate.weight.neg_()
    one, moved, other = (model_fingerprint(tmp_path / n) for n in ("one", "moved", "other"))
    assert one == moved != other
    (tmp_path / "moved" / "model.fp16.safetensors").write_bytes(b"beside it, and read by nobody")
    assert model_fingerprint(tmp_path / "moved") == one


FRESH = {
    "max_steps": 6, "learning_rate": 3e-3, "lr_scheduler_type": "cosine", "warmup_steps": 3,
    "weight_decay": 0.2, "adam_beta1": 0.7, "adam_beta2": 0.8, "adam_epsilon": 1e-5,
}  # fmt: skip


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", "adamw_torch_8bit"])
def test_new_options_stand_where_a_fresh_run_would_be(optim, tiny_moe, tokenizer, tmp_path):
    old = make_trainer(
        tiny_moe, tokenizer, tmp_path / "old", optim=optim, max_steps=2, save_strategy="steps",
        save_steps=2, lr_scheduler_type="linear",
    )  # fmt: skip
    old.train()
    fresh = make_trainer(tiny_moe, tokenizer, tmp_path / "fresh", optim=optim, **FRESH)
    fresh.train()
    resumed = make_trainer(tiny_moe, tokenizer, tmp_path / "resumed", optim=optim, **FRESH)
    resumed.train(resume_from_checkpoint=str(tmp_path / "old" / "checkpoint-2"))
    assert rates(resumed)[2:] == rates(fresh)[2:]
    for group, expected in zip(
        resumed.torch_optimizer.param_groups, fresh.torch_optimizer.param_groups, strict=True
    ):
        assert {k: v for k, v in group.items() if k != "params"} == (
            {k: v for k, v in expected.items() if k != "params"}
        )


def rates(trainer):
    return [(h["step"], h["learning_rate"]) for h in trainer.state.log_history if "loss" in h]


def test_a_checkpoint_beyond_the_end_is_refused(tiny_moe, tokenizer, tmp_path):
    make_trainer(
        tiny_moe, tokenizer, tmp_path, max_steps=3, save_strategy="steps", save_steps=3
    ).train()
    shorter = make_trainer(tiny_moe, tokenizer, tmp_path, max_steps=2)
    with pytest.raises(CheckpointError, match="at step 3, and the run would end after 2"):
        shorter.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))

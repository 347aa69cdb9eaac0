import logging

import pytest

from qwen3_sft.checkpoints.resume import CHANGEABLE, check_allowed, check_resumable, run_identity
from qwen3_sft.errors import CheckpointError, UsageError
from qwen3_sft.options.data_args import DataArguments
from qwen3_sft.options.train_args import TrainArguments

IDENTITY = {
    "global_batch_size": 4, "data": "d", "template": "t", "tokenizer": "k", "max_length": 64,
    "packing": True, "eval_fraction": 0.0, "seed": 1, "learning_rate": 1e-5,
    "lr_scheduler_type": "cosine", "weight_decay": 0.0, "optim": "adamw_torch",
}  # fmt: skip
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
    assert f"--allow_change {name}," in str(caught.value)
    with caplog.at_level(logging.WARNING, logger="qwen3_sft"):
        check_resumable(MANIFEST, "dtensor", 2, tmp_path, now, [name])
    assert f"another {name} {IDENTITY[name]} -> other" in caplog.text


@pytest.mark.parametrize("name", ["learning_rate", "lr_scheduler_type", "weight_decay", "optim"])
def test_what_the_checkpoint_would_overrule_is_refused_and_cannot_be_allowed(name, tmp_path):
    with pytest.raises(CheckpointError, match=f"{name} .* -> other. .* would be ignored"):
        check_resumable(
            MANIFEST, "dtensor", 2, tmp_path, IDENTITY | {name: "other"}, [*CHANGEABLE, name]
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


def test_the_identity_is_what_a_manifest_can_hold(tmp_path):
    args = TrainArguments(output_dir=str(tmp_path), use_cpu=True, seed=1)
    fingerprints = {"data": "d", "template": "t", "tokenizer": "k"}
    found = run_identity(args, DataArguments(max_length=64), fingerprints, 4)
    assert found.keys() == IDENTITY.keys()
    assert {type(value) for value in found.values()} <= {str, int, float, bool}
    assert (found["lr_scheduler_type"], found["optim"]) == ("cosine", "adamw_torch_fused")

"""What a save writes, what it refuses to write, and what it leaves when the disk is full."""

import json
import os
import subprocess

import pytest
import torch
from safetensors import safe_open
from torchao.optim.subclass_8bit import OptimState8bit
from torchao.optim.subclass_fp8 import OptimStateFp8
from transformers import AutoModelForCausalLM

from qwen3_sft.checkpoints import ledger as hashed_files
from qwen3_sft.checkpoints.finite import refuse_non_finite
from qwen3_sft.checkpoints.folders import newest_verified
from qwen3_sft.checkpoints.free_space import bytes_to_save, refuse_full_disk
from qwen3_sft.checkpoints.hub_writer import write_hub_model
from qwen3_sft.checkpoints.manifest import MANIFEST, verify
from qwen3_sft.checkpoints.state_tensors import model_tensors, optimizer_tensors, plain_tensors
from qwen3_sft.errors import CheckpointError
from tests.support.training import make_trainer

RUN = {"num_train_epochs": 9, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
FILES = {
    "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
    "optimizer.pt", "rng_state.pth", "scheduler.pt", "tokenizer.json", "tokenizer_config.json",
    "trainer_state.json",
}  # fmt: skip


@pytest.fixture
def disk(tmp_path):
    """A disk of 80 MiB; a save of the tiny model is expected to take up to 69 of them."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mount is not permitted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(folder, but):
    """Leave `but` bytes of the disk."""
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    with (folder / "filler").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free - but)


def test_a_checkpoint_holds_what_save_pretrained_writes(tiny_moe, tokenizer, tmp_path, monkeypatch):
    read_again = []
    original = hashed_files.hash_file
    monkeypatch.setattr(
        hashed_files, "hash_file", lambda path: read_again.append(path.name) or original(path)
    )
    trainer = make_trainer(tiny_moe, tokenizer, tmp_path, **RUN | {"max_steps": 2})
    trainer.train()
    folder = tmp_path / "checkpoint-2"
    # Only what upstream's code writes by itself: small, whatever the model.
    large = {"model.safetensors", "optimizer.pt", "scheduler.pt"}
    assert {*read_again} == FILES - large
    assert {*verify(folder)["files"]} == FILES
    assert {path.name for path in folder.iterdir()} == FILES | {MANIFEST}
    assert not (tmp_path / ".saving").exists()

    trainer.model.save_pretrained(tmp_path / "theirs")
    for name in ("config.json", "generation_config.json"):
        theirs = json.loads((tmp_path / "theirs" / name).read_text())
        ours = json.loads((folder / name).read_text())
        added = {"num_experts", "rope_theta", "rope_scaling", "torch_dtype"}
        assert ours.keys() - theirs.keys() == (added if name == "config.json" else set())
        wanted = theirs | ({"use_cache": True} if name == "config.json" else {})
        assert {key: ours[key] for key in theirs} == wanted
    check_same_tensors(folder, tmp_path / "theirs")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    for name, parameter in loaded.named_parameters():
        assert parameter.equal(trainer.model.get_parameter(name)), name


def check_same_tensors(folder, other):
    file, theirs = ({p.name: p for p in f.glob("*.safetensors")} for f in (folder, other))
    assert file.keys() == theirs.keys() == {"model.safetensors"}
    with (
        safe_open(file["model.safetensors"], "pt") as ours,
        safe_open(theirs["model.safetensors"], "pt") as expected,
    ):
        assert ours.metadata() == expected.metadata()
        assert {*ours.keys()} == {*expected.keys()}
        for key in expected.keys():  # noqa: SIM118
            tensor = ours.get_tensor(key)
            assert tensor.dtype == expected.get_tensor(key).dtype
            assert tensor.equal(expected.get_tensor(key)), key


def test_tied_weights_and_mixed_dtypes_are_written_as_upstream_does(tiny_moe, tmp_path):
    tiny_moe.config.tie_word_embeddings = True
    tiny_moe.tie_weights()
    tiny_moe.bfloat16()
    tiny_moe.model.norm.float()
    write_hub_model(tiny_moe, tmp_path / "ours")
    tiny_moe.save_pretrained(tmp_path / "theirs")
    check_same_tensors(tmp_path / "ours", tmp_path / "theirs")


def test_a_save_finds_the_leftovers_of_killed_ones(tiny_moe, tokenizer, tmp_path):
    for name in (".saving/checkpoint-2", ".removed-checkpoint-1"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "model.safetensors").write_text("half")
    trainer = make_trainer(tiny_moe, tokenizer, tmp_path, **RUN | {"max_steps": 2})
    trainer.train()
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["checkpoint-2"]
    verify(tmp_path / "checkpoint-2")


def test_a_foreign_checkpoint_of_this_step_is_refused_before_anything_is_written(
    tiny_moe, tokenizer, tmp_path
):
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "model.safetensors").write_text("mine")
    trainer = make_trainer(tiny_moe, tokenizer, tmp_path, **RUN | {"max_steps": 2})
    with pytest.raises(CheckpointError, match="checkpoint-2 was not written by us"):
        trainer.train()
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["checkpoint-2"]
    assert (tmp_path / "checkpoint-2" / "model.safetensors").read_text() == "mine"


def test_a_disk_without_room_is_refused_before_a_byte_is_written(tiny_moe, tokenizer, disk):
    trainer = make_trainer(tiny_moe, tokenizer, disk, **RUN)
    trainer.train(resume_from_checkpoint=None)
    (disk / "checkpoint-4" / "scheduler.pt").unlink()  # so that 4 would have to be written anew
    fill(disk, but=50_000_000)
    again = make_trainer(tiny_moe, tokenizer, disk, **RUN)
    with pytest.raises(CheckpointError, match=r"takes about \d+ bytes .*--save_total_limit 1"):
        again.train(resume_from_checkpoint=str(disk / "checkpoint-2"))
    assert newest_verified(disk)[0] == disk / "checkpoint-2"
    assert not (disk / ".saving").exists()


@pytest.mark.parametrize("room", [20_000, 400_000, 1_500_000])
def test_a_disk_that_fills_while_it_is_written(tiny_moe, tokenizer, disk, room):
    trainer = make_trainer(tiny_moe, tokenizer, disk, **RUN)
    prepare = trainer.saver._prepare

    def prepare_and_fill(*args):
        needed = prepare(*args)
        if trainer.state.global_step == 4:
            fill(disk, but=room)
        return needed

    trainer.saver._prepare = prepare_and_fill
    words = r"step 4: no checkpoint was written.* \d+ bytes, \d+ are free in .*No space left"
    with pytest.raises(CheckpointError, match=words):
        trainer.train()
    there = {path.name for path in disk.iterdir() if path.is_dir()}
    assert there == {"checkpoint-2"}
    assert newest_verified(disk) == (disk / "checkpoint-2", [])


def test_the_size_of_a_save_is_known_before(tiny_moe, tokenizer, tmp_path):
    trainer = make_trainer(tiny_moe, tokenizer, tmp_path, **RUN | {"max_steps": 2})
    trainer.train()
    files = verify(tmp_path / "checkpoint-2")["files"]
    tensors = sum(files[name]["bytes"] for name in ("model.safetensors", "optimizer.pt"))
    needed = bytes_to_save(trainer.model, trainer.optimizer, "whole")
    assert tensors < needed < 1.02 * tensors + (64 << 20)
    assert needed > sum(entry["bytes"] for entry in files.values())
    only_model = bytes_to_save(trainer.model, None, "whole")
    assert needed - only_model == pytest.approx(1.02 * files["optimizer.pt"]["bytes"], rel=0.05)
    refuse_full_disk(tmp_path, needed)
    with pytest.raises(CheckpointError, match=f"takes about {10**18} bytes"):
        refuse_full_disk(tmp_path, 10**18)


# ---- nothing that is not finite ----


@pytest.fixture
def layer():
    return torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.BatchNorm1d(8))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_weight_never_reaches_a_checkpoint(tiny_moe, value):
    refuse_non_finite(tiny_moe, 1)
    with torch.no_grad():
        tiny_moe.model.layers[1].mlp.experts.down_proj[0, 0, 0] = value
    with pytest.raises(
        CheckpointError, match=r"step 7: .*layers\.1\.mlp\.experts\.down_proj holds"
    ):
        refuse_non_finite(tiny_moe, 7)


def test_nor_a_buffer(layer):
    refuse_non_finite(layer, 1)
    layer[1].running_var[3] = float("inf")
    with pytest.raises(CheckpointError, match=r"1\.running_var holds"):
        refuse_non_finite(layer, 1)


@pytest.mark.parametrize(
    ("key", "state"),
    [
        ("exp_avg_sq", torch.ones(128, 64)), ("step", torch.ones(())),
        ("exp_avg", torch.ones(128, 64, dtype=torch.bfloat16)),
        ("exp_avg", OptimState8bit.zeros((128, 64))),
        ("exp_avg", OptimStateFp8.zeros((128, 64))),
    ],
)  # fmt: skip
def test_nor_a_state_of_the_optimizer(key, state):
    model = torch.nn.Linear(64, 128, bias=False).bfloat16()
    optimizer = torch.optim.SGD(model.parameters())
    optimizer.state[model.weight] = {"first": torch.zeros(3), key: state}
    refuse_non_finite(model, 1, optimizer)
    parts = [part for part in plain_tensors(state) if part.is_floating_point()]
    assert parts
    for part in parts:
        kept = part.clone()
        part.view(-1)[-1] = float("nan")
        with pytest.raises(CheckpointError, match=f"the optimizer's {key} of weight holds"):
            refuse_non_finite(model, 1, optimizer)
        refuse_non_finite(model, 1)  # where it is not saved
        part.copy_(kept)
    refuse_non_finite(model, 1, optimizer)


def test_master_weights_in_an_optimizer_are_held_too():
    """As DeepSpeed has them: an optimizer in an optimizer, with weights of its own."""
    model = torch.nn.Linear(4, 4).bfloat16()
    master = torch.nn.Parameter(torch.zeros(20))
    master.grad = torch.ones(20)
    inner = torch.optim.AdamW([master])
    inner.step()
    outer = type("Outer", (), {"optimizer": inner})()
    held = dict(optimizer_tensors(model, outer))
    assert len(held) == 4
    assert held["part 2 of the optimizer's weights"] is master
    inner.param_groups[0]["params"] = []  # as ZeRO-3 leaves them
    assert held.keys() == dict(optimizer_tensors(model, outer)).keys()
    assert [name for name, _ in model_tensors(model)] == ["weight", "bias"]
    master.data[3] = float("nan")
    with pytest.raises(CheckpointError, match="part 2 of the optimizer's weights holds"):
        refuse_non_finite(model, 1, outer)

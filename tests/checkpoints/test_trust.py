"""Planted pickles in every file of a checkpoint run nothing, and what we write is not refused."""

import json
import os
import pickle
import shutil
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from transformers import PreTrainedModel

from qwen3_sft.checkpoints.ledger import Ledger
from qwen3_sft.checkpoints.manifest import MANIFEST
from qwen3_sft.checkpoints.pickles import IN_ARCHIVES, IN_METADATA, read_inert
from qwen3_sft.checkpoints.sharded import load_optimizer, save_optimizer, save_weights
from qwen3_sft.checkpoints.trust import best_checkpoint, check_best, refuse_foreign_code
from qwen3_sft.checkpoints.whole import load_checkpoint
from qwen3_sft.checkpoints.write import write_enums_by_value
from qwen3_sft.cli import main
from qwen3_sft.demo.model import tiny_config, tiny_model
from qwen3_sft.errors import CheckpointError, ModelError, RefusedPickleError
from qwen3_sft.model.base_files import weight_files
from tests.support.planted import Attack, Reduced, plant, reseal
from tests.support.training import make_trainer

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

LAYOUTS = ("whole", "dtensor", "zero")
# Files that no loader takes for a pickle, whatever is in them.
TEXT = (".jinja", ".py", "latest")


@pytest.fixture
def attack(tmp_path):
    return Attack(tmp_path / "ran")


@pytest.fixture(scope="module")
def made(tokenizer, tmp_path_factory):
    """A real trainer, a checkpoint of it, and the same state in the other layouts' files."""
    folder = tmp_path_factory.mktemp("made")
    config = tiny_config(
        len(tokenizer), hidden_size=64, moe_intermediate_size=48, num_hidden_layers=2,
        num_experts=8, head_dim=16,
    )  # fmt: skip
    trainer = make_trainer(
        tiny_model(config), tokenizer, folder, max_steps=1, save_strategy="steps", save_steps=1
    )
    trainer.train()
    (folder / "checkpoint-1").rename(folder / "whole")
    others = shutil.ignore_patterns("model.safetensors", "optimizer.pt")
    for layout in LAYOUTS[1:]:
        shutil.copytree(folder / "whole", folder / layout, ignore=others)
    optimizer = trainer.optimizer.optimizer
    ledger = Ledger(folder / "dtensor")
    save_weights(trainer.model, folder / "dtensor", ledger)
    save_optimizer(trainer.model, optimizer, folder / "dtensor", ledger)
    write_zero(trainer.model, folder / "zero")
    for layout in LAYOUTS[1:]:
        reseal(folder / layout, layout=layout)
    return folder, trainer


def write_zero(model: PreTrainedModel, folder):
    """The files of DeepSpeed's ZeRO-2 on one process, as `zero_to_fp32` reads them."""
    step = folder / "global_step1"
    step.mkdir()
    (folder / "latest").write_text("global_step1")
    (folder / "zero_to_fp32.py").write_text("raise SystemExit('this script ran')\n")
    weights = OrderedDict((n, p.detach().float()) for n, p in model.named_parameters())
    shapes = OrderedDict((name, weight.shape) for name, weight in weights.items())
    states = {
        "module": dict(model.named_buffers()), "buffer_names": [], "param_shapes": [shapes],
        "shared_params": {}, "ds_version": "0.19",
    }  # fmt: skip
    torch.save(states, step / "mp_rank_00_model_states.pt")
    flat = torch.cat([weight.flatten() for weight in weights.values()])
    inner = {
        "zero_stage": 2, "partition_count": 1, "single_partition_of_fp32_groups": [flat],
    }  # fmt: skip
    file = step / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.save({"optimizer_state_dict": inner}, file)


@pytest.fixture(params=LAYOUTS)
def checkpoint(request, made, tmp_path):
    return shutil.copytree(made[0] / request.param, tmp_path / "checkpoint-1")


def test_what_we_write_is_not_refused_and_loads(checkpoint, made):
    refuse_foreign_code(checkpoint, trusted=False)
    if (checkpoint / "latest").exists():
        pytest.importorskip("deepspeed")
    loaded = load_checkpoint(checkpoint).state_dict()
    for name, weight in made[1].model.state_dict().items():
        assert torch.equal(loaded[name], weight), name


def test_planted_pickles_run_nothing_in_any_file(checkpoint, attack):
    files = [p for p in sorted(checkpoint.rglob("*")) if p.is_file() and p.name != MANIFEST]
    assert len(files) >= 10
    for file in files:
        whole = file.read_bytes()
        for name, payload in attack.payloads().items():
            plant(checkpoint, file, payload)
            is_binary = payload.startswith((b"\x80", b"PK"))
            if file.name.endswith(TEXT) and not (is_binary or file.name == "latest"):
                refuse_foreign_code(checkpoint, trusted=False)  # nobody unpickles text
            else:
                with pytest.raises(CheckpointError) as refused:
                    load_checkpoint(checkpoint)
                assert str(refused.value).startswith(str(checkpoint)), (file, name)
            assert not attack.ran(), (file, name)
        plant(checkpoint, file, whole)


@pytest.mark.parametrize("layout", ["dtensor", "zero"])
def test_without_the_check_a_checkpoint_runs_code(made, tmp_path, attack, layout, capfd):
    folder = shutil.copytree(made[0] / layout, tmp_path / "checkpoint-1")
    if layout == "dtensor":
        planted = folder / "optimizer" / ".metadata"
        planted.write_bytes(pickle.dumps(attack))
        with pytest.raises(CheckpointException):
            load_optimizer(made[1].model, made[1].optimizer.optimizer, folder)
        assert attack.ran()
    else:
        planted = folder / "global_step1" / "mp_rank_00_model_states.pt"
        torch.save(attack, planted)
    reseal(folder)
    options = ["export", str(folder), str(tmp_path / "out")]
    if layout == "zero":
        pytest.importorskip("deepspeed")
        with pytest.raises(AttributeError):  # it got what the command returned
            main([*options, "--trust_checkpoint", "true"])
        assert attack.ran()
    assert main(options) == 1
    assert f"{planted} would import posix.system: refused" in capfd.readouterr().err
    assert not attack.ran()
    assert not (tmp_path / "out").exists()


# ---- distributed checkpoints ----


@pytest.fixture
def distributed(tmp_path):
    """A distributed checkpoint with a value that is no tensor."""
    folder, state = tmp_path / "state", {"weight": torch.arange(6.0), "value": {"step": 1}}
    write_enums_by_value()
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    refuse_foreign_code(folder, trusted=False)
    return folder


def change(folder, edit):
    """Write `.metadata` again after `edit` has changed it."""
    metadata: Metadata = pickle.loads((folder / ".metadata").read_bytes())
    edit(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return metadata


def test_values_in_a_distributed_checkpoint_are_looked_at(distributed, attack):
    """They are loaded with weights_only=False, though `.metadata` itself is clean."""
    payload = attack.saved(attack)
    with next(distributed.glob("*.distcp")).open("ab") as file:
        offset = file.tell()
        file.write(payload)

    def edit(metadata):
        [info] = [i for index, i in metadata.storage_data.items() if index.fqn == "value.step"]
        info.offset, info.length = offset, len(payload)

    change(distributed, edit)
    with pytest.raises(CheckpointError, match=rf"byte {offset} of .*import posix\.system"):
        refuse_foreign_code(distributed, trusted=False)
    assert not attack.ran()
    dcp.load(
        {"weight": torch.zeros(6), "value": {"step": 0}}, checkpoint_id=distributed, no_dist=True
    )
    assert attack.ran()


@pytest.mark.parametrize(
    "changed",
    [
        {"relative_path": "../outside"}, {"relative_path": "/etc/passwd"},
        {"relative_path": "absent.distcp"}, {"offset": -1}, {"length": 1 << 40},
        {"transform_descriptors": ["zstd"]}, {"relative_path": None},
    ],
)  # fmt: skip
def test_chunks_lie_in_files_beside_the_metadata(distributed, changed):
    (distributed.parent / "outside").write_bytes(next(distributed.glob("*.distcp")).read_bytes())
    change(distributed, lambda m: next(iter(m.storage_data.values())).__dict__.update(changed))
    with pytest.raises(CheckpointError, match=r"\.metadata (has a chunk|names)"):
        refuse_foreign_code(distributed, trusted=False)


def test_what_is_checked_is_what_is_loaded(distributed):
    """A state that is set twice, or hidden in arguments, would be another object when loaded."""
    data = (distributed / ".metadata").read_bytes()
    twice = data[:-1] + b"}b."  # BUILD again
    with pytest.raises(RefusedPickleError, match="twice"):
        read_inert(twice, IN_METADATA)
    metadata = pickle.loads(data)
    fields = [metadata.state_dict_metadata, metadata.planner_data, metadata.storage_data]
    for state in ((), (vars(metadata),)):
        made = Reduced(Metadata, tuple(fields), *state)
        (distributed / ".metadata").write_bytes(pickle.dumps(made))
        with pytest.raises(CheckpointError, match="has no Metadata"):
            refuse_foreign_code(distributed, trusted=False)
    # A dictionary that is changed after an object has taken its entries over.
    later = (
        b"\x80\x04ccollections\nOrderedDict\n)\x81}\x94(\x8c\x01kK\x01ubh\x00\x8c\x01kK\x02s\x86."
    )
    made, entries = read_inert(later, IN_ARCHIVES)
    assert (made.state, entries) == ({"k": 1}, {"k": 2})


# ---- other files ----


def test_a_script_in_the_folder_is_never_run(made, tmp_path, attack):
    """DeepSpeed leaves `zero_to_fp32.py` there."""
    pytest.importorskip("deepspeed")
    folder = shutil.copytree(made[0] / "zero", tmp_path / "checkpoint-1")
    script = f"import os\nos.system({attack.command!r})\n"
    for name in ("zero_to_fp32.py", "zero_to_torch.py", "__init__.py", "torch.py", "latest.py"):
        (folder / name).write_text(script)
    reseal(folder)
    load_checkpoint(folder)
    assert not attack.ran()


@pytest.mark.parametrize("tag", ["../evil", "/tmp/evil", "", "..", "a/b"])
def test_deepspeed_is_not_led_out_of_the_folder(made, tmp_path, tag):
    folder = shutil.copytree(made[0] / "zero", tmp_path / "checkpoint-1")
    (folder / "latest").write_text(tag)
    reseal(folder)
    with pytest.raises(CheckpointError, match=r"latest names .* which is no folder beside it"):
        load_checkpoint(folder)


def test_links_to_folders_and_pipes_are_refused(made, tmp_path):
    folder = shutil.copytree(made[0] / "whole", tmp_path / "checkpoint-1")
    (folder / "optimizer").symlink_to(made[0] / "dtensor" / "optimizer")
    with pytest.raises(CheckpointError, match="optimizer is a link to a folder"):
        refuse_foreign_code(folder, trusted=False)
    (folder / "optimizer").unlink()
    os.mkfifo(folder / "more.pt")
    with pytest.raises(CheckpointError, match=r"more\.pt is no regular file"):
        refuse_foreign_code(folder, trusted=False)


@pytest.mark.parametrize("name", ["../../x.safetensors", "/x.safetensors", "a/b", "", 3])
def test_an_index_does_not_lead_out_of_the_folder(made, tmp_path, name):
    folder = shutil.copytree(made[0] / "whole", tmp_path / "checkpoint-1")
    save_file({"w": torch.zeros(1)}, tmp_path / "x.safetensors")
    index = {"weight_map": {"w": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    reseal(folder)
    with pytest.raises(CheckpointError, match=r"which is no file beside"):
        load_checkpoint(folder)
    with pytest.raises(ModelError, match=r"which is no file beside"):
        weight_files(folder)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd"])
def test_a_manifest_names_files_of_its_folder_alone(made, tmp_path, name):
    folder = shutil.copytree(made[0] / "whole", tmp_path / "checkpoint-1")
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][name] = {"bytes": 1, "xxh3": "0"}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="is not a file of this folder"):
        load_checkpoint(folder)


def test_the_best_checkpoint_is_one_of_the_run(made, tmp_path):
    own, other = tmp_path / "run" / "checkpoint-1", tmp_path / "other" / "checkpoint-1"
    shutil.copytree(made[0] / "whole", own)
    assert best_checkpoint(str(own), own.parent) == own
    assert best_checkpoint("moved/from/here/checkpoint-1", own.parent) == own
    other.mkdir(parents=True)
    state = own / "trainer_state.json"
    for named in (str(other), "/", "..", f"{own}/..", str(own / "checkpoint-2"), 7):
        state.write_text(json.dumps({"best_model_checkpoint": named}))
        with pytest.raises(CheckpointError, match="as the best checkpoint, which is none of"):
            check_best(own, own.parent)


def test_the_best_checkpoint_is_looked_at_before_it_is_loaded(made, attack):
    folder, trainer = made
    best = shutil.copytree(folder / "whole", folder / "checkpoint-7")
    trainer.state.best_model_checkpoint = str(best)
    trainer._load_best_model()
    torch.save(attack, best / "scheduler.pt")
    reseal(best)
    with pytest.raises(CheckpointError, match=r"scheduler\.pt would import posix\.system"):
        trainer._load_best_model()
    trainer.state.best_model_checkpoint = str(folder / "whole")
    with pytest.raises(CheckpointError, match="as the best checkpoint, which is none of"):
        trainer._load_best_model()

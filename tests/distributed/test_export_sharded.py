import json
from importlib.util import find_spec

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

from qwen3_sft.demo.model import write_checkpoint
from qwen3_sft.export.export import export_model
from qwen3_sft.records.ownership import EXPORT_MARK
from tests.distributed import export_worker
from tests.support.commands import succeeds
from tests.support.forked import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

RANKS = range(4)
ENGINES = {
    "fsdp4_ep2": "(_StridedShard(dim=0, sf=2), Shard(dim=0))",
    "hsdp_ep2": "(Replicate(), _StridedShard(dim=0, sf=2), Shard(dim=0))",
    "fully_shard": "(Shard(dim=0),)",
    "long_check": "None",
    "zero3": "None",
}
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")


@pytest.fixture(scope="module")
def exports(tokenizer, tmp_path_factory):
    """Folders of all cases, from one tree of four processes, and the same from this process."""
    folder = tmp_path_factory.mktemp("exports")
    torch.manual_seed(0)
    write_checkpoint(folder / "base", tokenizer)
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    # Stored with fused experts: an engine's way of loading must not decide the exported names.
    model.save_pretrained(folder / "base", save_original_format=False)
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    export_model(model, folder / "base", folder / "one_process")
    # DeepSpeed would look for a GPU; without the package the case is left out.
    environment = {"DS_ACCELERATOR": "cpu"} if find_spec("deepspeed") else {}
    args = (folder / "base", folder)
    succeeds(
        run_ranks(len(RANKS), export_worker.main, *args, folder=folder / "printed", **environment)
    )
    return folder


def facts(exports, case):
    return [json.loads((exports / f"{case}.{rank}.json").read_text()) for rank in RANKS]


def tensors_of(folder):
    held = {}
    for path in folder.glob("*.safetensors"):
        held |= safetensors.torch.load_file(path)
    return held


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=needs_deepspeed if c == "zero3" else ()) for c in ENGINES]
)
def test_every_engine_exports_what_one_process_does(exports, case):
    for fact in facts(exports, case):
        assert fact["error"] is None
        assert fact["placements"] == ENGINES[case]
        assert (fact["numel"] == 0) == (case == "zero3")
    expected, actual = tensors_of(exports / "one_process"), tensors_of(exports / case)
    assert actual.keys() == expected.keys()
    assert "model.layers.0.mlp.experts.0.up_proj.weight" in actual
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name
    for path in (exports / "one_process").iterdir():
        if path.suffix != ".safetensors" and path.name != EXPORT_MARK:
            assert (exports / case / path.name).read_bytes() == path.read_bytes(), path.name
    assert len(list((exports / case).glob("*.safetensors"))) == (12 if case == "fully_shard" else 1)
    assert not (exports / f".{case}.qwen3_sft-partial").exists()


@pytest.mark.parametrize(
    ("case", "words"), [("a_file", "a file stands in"), ("disk", "File too large")]
)
def test_a_failure_of_rank_0_ends_all_ranks_alike(exports, case, words):
    errors = {fact["error"] for fact in facts(exports, case)}
    assert len(errors) == 1
    assert words in errors.pop()
    assert not (exports / case).is_dir()


def test_rank_0_gives_signs_of_life_while_it_checks(exports):
    """Without them a check of 61 GB would run into the process group's timeout."""
    told = facts(exports, "signs")
    assert all(fact == told[0] for fact in told)
    assert told[0]["number"] >= 2
    assert told[0]["agreements"] == 3

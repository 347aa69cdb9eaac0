"""Loading holds no more in host memory than it has to."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from qwen3_sft.demo.model import tiny_config, tiny_model
from qwen3_sft.distributed.engine import Engine
from qwen3_sft.model.loading import load_model
from qwen3_sft.options.model_args import ModelArguments
from tests.support.source_tree import ROOT

# As experts are read and fused: small blocks, freed between others that stay.
FUSE = """
import sys
from contextlib import nullcontext
from pathlib import Path
import torch
from qwen3_sft.model.host_memory import blocks_given_back

def own():
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(l.split()[1]) for l in lines if l.startswith("RssAnon")) // 1024

torch.set_num_threads(1)
torch.ones(8 * 2**20)
before, kept = own(), []
with blocks_given_back() if sys.argv[1] == "on" else nullcontext():
    for layer in range(8):
        experts = [torch.ones(2**18 + expert) for expert in range(32)]
        kept.append(torch.cat(experts))
        kept.append(torch.ones(2**18))
        del experts
    print(own() - before - sum(t.nbytes for t in kept) // 2**20)
"""


def left_over(switch: str) -> int:
    """MiB beyond what is kept, in a process of its own: the C library is changed."""
    command = [sys.executable, "-c", FUSE, switch]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_freed_blocks_go_back():
    assert left_over("on") <= 4
    assert left_over("off") >= 20, "without it glibc keeps them: is the setting still needed?"


@pytest.fixture
def group(monkeypatch):
    """A process group of one, in which accelerate's launcher has switched FSDP on."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    yield
    dist.destroy_process_group()


@pytest.fixture
def unwritten_is_nan():
    """Memory nobody wrote holds NaN, not the same weights as an earlier model left them there."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("local_rank", "efficient"), [("0", "true"), ("1", "true"), ("1", "false")]
)
def test_weights_that_will_be_overwritten_are_not_read(
    group, unwritten_is_nan, monkeypatch, tmp_path, local_rank, efficient, tied
):
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", efficient)
    saved = tiny_model(tiny_config(512, tie_word_embeddings=tied))
    saved.save_pretrained(tmp_path)
    model = load_model(
        tmp_path, ModelArguments(), torch.device("cpu"), torch.float32, "sdpa",
        engine=Engine("fsdp"),
    )  # fmt: skip
    is_read = local_rank == "0" or efficient == "false"
    name = "model.layers.0.mlp.experts.down_proj"
    expected = dict(saved.named_parameters())
    assert [*dict(model.named_parameters())] == [*expected]
    loaded = model.get_parameter(name)
    assert torch.equal(loaded, expected[name]) if is_read else loaded.isnan().all()
    # accelerate tells weights apart by address, and keeps buffers.
    addresses = [p.data_ptr() for p in model.parameters()]
    assert len(set(addresses)) == len(addresses)
    assert 0 not in addresses
    assert all(p.requires_grad and p.device.type == "cpu" for p in model.parameters())
    for key, buffer in saved.named_buffers():
        assert torch.equal(model.get_buffer(key), buffer), key
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied

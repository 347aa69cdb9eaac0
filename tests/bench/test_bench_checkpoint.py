"""The benchmark of saving runs, and its rows differ in the hash alone."""

from importlib import import_module

import pytest

from qwen3_sft.checkpoints.manifest import verify
from qwen3_sft.errors import CheckpointError
from tests.support.source_tree import ROOT


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    bench = import_module("checkpoint")
    monkeypatch.setattr(bench, "drop_caches", lambda: None)  # of this machine: others read too
    return bench


def test_every_way_writes_the_same_files(bench, tmp_path):
    model, optimizer = bench.make("tiny")
    contents = {}
    for way in bench.WAYS:
        times = bench.save(model, optimizer, tmp_path / "save", way)
        assert 0 < times["written_s"] <= times["sealed_s"]
        if way == "none":
            with pytest.raises(CheckpointError, match="content differs"):
                verify(tmp_path / "save")
        else:
            verify(tmp_path / "save")
        names = ("model.safetensors", "optimizer.pt")
        contents[way] = [(tmp_path / "save" / name).read_bytes() for name in names]
    assert all(content == contents["none"] for content in contents.values())

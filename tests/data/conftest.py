"""A file of conversations in a folder of its own, and the options that read it."""

from __future__ import annotations

import pytest

from qwen3_sft.demo.conversations import conversations
from qwen3_sft.options.data_args import DataArguments
from tests.support.prepared import NUM_ROWS, write


@pytest.fixture(scope="module")
def rows():
    return [row for row, _ in zip(conversations(), range(NUM_ROWS), strict=False)]


@pytest.fixture
def args(tmp_path, monkeypatch, rows):
    monkeypatch.chdir(tmp_path)
    write(rows)
    return DataArguments(dataset=["data.jsonl"], data_cache_dir="cache", num_proc=1)

"""Fixtures every test shares: a tiny Qwen3-MoE, its tokenizer, a fixed seed, an idle process."""

from __future__ import annotations

import gc
import inspect
import logging
import random
import subprocess
import textwrap

import numpy as np
import pytest
import torch

from tests.support import interpreter

interpreter.enable()  # before the first import of triton, which transformers may do

from qwen3_sft.demo.model import tiny_config, tiny_model, train_tokenizer  # noqa: E402
from tests.support.upstream import Upstream  # noqa: E402


@pytest.fixture(autouse=True)
def _seed():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _logging():
    """Put back what a command run in this process has set up, which caplog would not see past."""
    loggers = [logging.getLogger(name) for name in ("qwen3_sft", "monkey_patch")]
    before = [(log.handlers, log.level, log.propagate) for log in loggers]
    yield
    for log, (handlers, level, propagate) in zip(loggers, before, strict=True):
        log.handlers, log.propagate = handlers, propagate
        log.setLevel(level)


@pytest.fixture(autouse=True)
def _upstream():
    """Refuse a test that leaves transformers' modules changed for those after it."""
    before = Upstream()
    yield
    assert not (changed := before.restore()), f"transformers is left changed: {changed[:5]}"


@pytest.fixture
def liger_is_undone():
    """Let a test have Liger replace names of transformers, for itself alone."""
    before = Upstream()
    yield
    before.restore()


@pytest.fixture(scope="session")
def tokenizer():
    """Byte-level BPE of 1,024 tokens with Qwen3's control tokens and (thinking) chat template."""
    return train_tokenizer([inspect.getsource(textwrap), inspect.getsource(random)], 1024)


@pytest.fixture
def tiny_moe(tokenizer):
    """A fresh float32 Qwen3-MoE: 2 layers, 8 experts top-2, hidden 64, intermediate 48."""
    config = tiny_config(
        len(tokenizer),
        hidden_size=64,
        moe_intermediate_size=48,
        num_hidden_layers=2,
        num_experts=8,
        head_dim=16,
    )
    return tiny_model(config)


@pytest.fixture
def child():
    """A process that does nothing, to watch, stop and kill; it is gone after the test."""
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


def pytest_collection_finish():
    """Keep what is imported out of garbage collections, of which every training run has several."""
    gc.collect()
    gc.freeze()

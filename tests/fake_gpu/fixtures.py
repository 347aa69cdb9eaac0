"""Fixtures of the exercises."""

from __future__ import annotations

import pytest
import torch

from tests.fake_gpu.cards import Card, insert


@pytest.fixture(autouse=True)
def _one_thread():
    """Autograd's threads of a device ask it for more than the stand-in has, and are not traced."""
    torch.autograd.set_multithreading_enabled(False)
    yield
    torch.autograd.set_multithreading_enabled(True)


@pytest.fixture
def insert_card(monkeypatch):
    """Return a function that has torch.cuda answer for a card."""
    return lambda name="H200", **facts: insert(Card(name, **facts), monkeypatch)


@pytest.fixture
def card(insert_card):
    return insert_card()


@pytest.fixture
def uncompiled(monkeypatch):
    """Have torch.compile hand functions back; returns what was to be compiled."""
    found = []

    def compile(model, *, fullgraph=False, dynamic=None, **options):
        found.append(model)
        return model

    monkeypatch.setattr(torch, "compile", compile)
    return found

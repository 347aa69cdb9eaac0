"""Which attention a GPU gets, and what is called with what."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import _fa4, _registry

from monkey_patch.kernels.varlen_attention import op
from monkey_patch.kernels.varlen_attention.reference import varlen_attention_reference
from qwen3_sft import errors
from qwen3_sft.model import attention, attention_trial
from qwen3_sft.model.attention import KERNELS, choose_attention
from tests.fake_gpu import flash_stubs

CPU, CUDA, BF16 = torch.device("cpu"), torch.device("cuda"), torch.bfloat16
ENDS = (0, 5, 5, 30)


@pytest.fixture
def flash(monkeypatch):
    """All three packages; CPU tensors take the way of CUDA's."""
    monkeypatch.setattr(attention_trial, "varlen_attention", op._flash)
    operators = flash_stubs.install(monkeypatch)
    installed = {
        name: replace(kernel, is_installed=lambda: True) for name, kernel in KERNELS.items()
    }
    monkeypatch.setattr(attention, "KERNELS", installed)
    yield operators
    for library in operators:
        library._destroy()


def on_cpu(name, device, dtype, head_dim):
    """The trial with its tensors where they can be."""
    return attention_trial.trial(name, CPU, dtype, head_dim)


ON = {"flash_attention_2": "A100 80GB", "flash_attention_3": "H200", "flash_attention_4": "B200"}


@pytest.mark.parametrize("name", KERNELS)
def test_a_package_is_called_with_what_it_takes(flash, insert_card, name):
    insert_card(ON[name])
    assert attention_trial.trial(name, CPU, BF16, 64) is None


def test_flash_attention_4_still_needs_its_adapter(flash, insert_card, monkeypatch):
    insert_card("B200")
    monkeypatch.setattr(attention_trial, "adapt_flash_attention_4", lambda: None)
    monkeypatch.setitem(_registry._FLASH_ATTENTION_IMPLS, "FA4", _fa4.register_flash_attention_fa4)
    problem = attention_trial.trial("flash_attention_4", CPU, BF16, 64)
    assert problem == "ValueError: too many values to unpack (expected 2)"


@pytest.mark.parametrize("name", KERNELS)
def test_a_package_that_forgets_the_documents_is_noticed(flash, insert_card, monkeypatch, name):
    insert_card(ON[name])
    attend = flash_stubs._attend
    monkeypatch.setattr(
        flash_stubs, "_attend", lambda q, k, v, ends, scale: attend(q, k, v, ends[[0, -1]], scale)
    )
    assert "is off by" in attention_trial.trial(name, CPU, BF16, 64)


@pytest.mark.parametrize(("chosen", "name"), [*ON.items()][1:])
def test_each_card_gets_its_own(flash, insert_card, monkeypatch, name, chosen):
    insert_card(name)
    choose = {"capability": torch.cuda.get_device_capability, "attempt": on_cpu}
    assert choose_attention("auto", CUDA, BF16, 64, **choose)[0] == chosen
    assert choose_attention(chosen, CUDA, BF16, 64, **choose) == (chosen, "as requested")
    # torch 2.11 repeats keys and values, FlashAttention 2 does not.
    monkeypatch.setattr(attention, "takes_groups", lambda: False)
    attempt = lambda kernel, *rest: None if kernel == "flash_attention_2" else "broken"  # noqa: E731
    choose["attempt"] = attempt
    assert choose_attention("auto", CUDA, BF16, 64, **choose)[0] == "flash_attention_2"
    choose["attempt"] = lambda *_: "broken"
    with pytest.raises(errors.ModelError, match=r"no attention kernel.*torch_varlen: broken"):
        choose_attention("auto", CUDA, BF16, 64, **choose)
    with pytest.raises(errors.ModelError, match=f"{chosen}: broken"):
        choose_attention(chosen, CUDA, BF16, 64, **choose)


def test_a_package_that_is_missing(insert_card):
    insert_card("H200")
    with pytest.raises(errors.ModelError, match="flash_attention_3: not installed"):
        choose_attention("flash_attention_3", CUDA, BF16, 64)


def torch_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
    """The signature of torch 2.10: no groups, and a fixed factor."""
    assert query.shape[1] == key.shape[1]
    return flash_stubs.flash_attn_varlen_func(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, causal=is_causal
    )


def torch_2_13(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
    window_size=(-1, -1), enable_gqa=False,
):  # fmt: skip
    assert enable_gqa or query.shape[1] == key.shape[1]
    return flash_stubs.flash_attn_varlen_func(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, softmax_scale=scale,
        causal=window_size == (-1, 0),
    )  # fmt: skip


@pytest.mark.parametrize("function", [torch_2_11, torch_2_13])
def test_every_version_of_torchs_function_gives_the_same(monkeypatch, function):
    names = frozenset(inspect.signature(function).parameters)
    monkeypatch.setattr(op, "_torch_varlen_attn", lambda: (function, names))
    q, k, v = (torch.randn(heads, ENDS[-1], 16).to(BF16) for heads in (4, 2, 2))
    ends = torch.tensor(ENDS, dtype=torch.int32)
    expected = varlen_attention_reference(*(t.double() for t in (q, k, v)), ends, 0.3)
    found = op._flash(q, k, v, ends, 30, 0.3)
    torch.testing.assert_close(found.double(), expected, atol=2e-2, rtol=2e-2)

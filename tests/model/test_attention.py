from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import _registry

import monkey_patch
from monkey_patch.kernels.varlen_attention import op
from qwen3_sft.errors import ModelError
from qwen3_sft.model import attention, attention_trial
from qwen3_sft.model.activation_checkpointing import SeenOperators, enable_checkpointing
from qwen3_sft.model.attention import KERNELS, check_attention, choose_attention
from qwen3_sft.model.attention_trial import switched_on, trial

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ALL = tuple(KERNELS)
RIGHT = "its output is off by 0.5 of the largest value"


@pytest.fixture
def choose(monkeypatch):
    """Return what is chosen on a GPU of a capability where these packages are installed."""

    def chosen(major, installed=ALL, *, head_dim=128, broken=(), groups=True, requested="auto"):
        kernels = {
            n: replace(k, is_installed=lambda n=n: n in installed) for n, k in KERNELS.items()
        }
        monkeypatch.setattr(attention, "KERNELS", kernels)
        monkeypatch.setattr(attention, "takes_groups", lambda: groups)
        return choose_attention(
            requested, CUDA, torch.bfloat16, head_dim,
            capability=lambda _: (major, 0),
            attempt=lambda name, *_: RIGHT if name in broken else None,
        )  # fmt: skip

    return chosen


# capability, installed, head_dim, whether torch's kernels take groups -> chosen
TABLE = {
    "A100": (8, ALL, 128, True, "torch_varlen"),
    "A100, torch 2.11": (8, ALL, 128, False, "flash_attention_2"),
    "H200": (9, ALL, 128, True, "flash_attention_3"),
    "H200, wide heads": (9, ALL, 256, True, "flash_attention_3"),
    "H200, odd heads": (9, ALL, 100, True, "torch_varlen"),
    "H200, no FA3": (9, ("flash_attention_4", "flash_attention_2"), 128, True, "torch_varlen"),
    "H200, torch 2.11": (9, ("flash_attention_2",), 128, False, "flash_attention_2"),
    "B200": (10, ALL, 128, True, "flash_attention_4"),
    "B200, wide heads": (10, ALL, 256, True, "flash_attention_4"),
    "B200, heads that FA4 lacks there": (10, ALL, 192, True, "torch_varlen"),
    "B200, no FA4": (10, ("flash_attention_3", "flash_attention_2"), 128, True, "torch_varlen"),
    "RTX 5090": (12, ALL, 128, True, "torch_varlen"),
    "bare": (9, (), 128, False, "torch_varlen"),
}


@pytest.mark.parametrize(
    ("major", "installed", "head_dim", "groups", "name"), TABLE.values(), ids=TABLE
)
def test_auto_takes_what_is_made_for_the_device(choose, major, installed, head_dim, groups, name):
    assert choose(major, installed, head_dim=head_dim, groups=groups)[0] == name


def test_a_kernel_that_fails_is_passed_over_with_a_word(choose, caplog):
    assert choose(9, broken=("flash_attention_3",))[0] == "torch_varlen"
    assert f"flash_attention_3 is passed over: {RIGHT}" in caplog.text
    with pytest.raises(ModelError, match=r"no attention kernel computes right.*torch_varlen: its"):
        choose(9, broken=(*ALL, "torch_varlen"))


def test_what_is_asked_for_is_tried_and_never_replaced(choose):
    assert choose(9, requested="flash_attention_4") == ("flash_attention_4", "as requested")
    with pytest.raises(ModelError, match=f"--attn_implementation flash_attention_4: {RIGHT}"):
        choose(9, requested="flash_attention_4", broken=ALL)
    assert choose(9, requested="sdpa", broken=(*ALL, "sdpa"))[0] == "sdpa"


def test_without_a_gpu():
    assert choose_attention("auto", CPU, torch.float32, 128)[0] == "torch_varlen"
    assert choose_attention("eager", CPU, torch.float32, 128)[0] == "eager"
    for device, dtype in ((CPU, torch.bfloat16), (CUDA, torch.float32)):
        with pytest.raises(ModelError, match="needs a CUDA device and bfloat16"):
            check_attention("flash_attention_2", device, dtype)
    with pytest.raises(ModelError, match="flash_attention_3: not installed"):
        check_attention("flash_attention_3", CUDA, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_right_kernel_passes_its_trial(dtype):
    assert trial("torch_varlen", CPU, dtype, 64) is None


def _swapped(q, k, v, *rest):
    return op.varlen_attention(k.repeat_interleave(2, 0), q[::2], v, *rest)


def _leaking(q, k, v, ends, *rest):
    return op.varlen_attention(q, k, v, ends[[0, -1]], *rest)


def _wrong_gradient(q, k, v, *rest):
    return op.varlen_attention(q.detach() * 2 - q, k, v, *rest)


def _failing(*_):
    raise RuntimeError("no kernel image is available")


@pytest.mark.parametrize(
    ("kernel", "problem"),
    [
        (_swapped, "its output is off"), (_leaking, "its output is off"),
        (_wrong_gradient, "is off"), (_failing, "RuntimeError: no kernel image"),
    ],
    ids=["swapped", "leaking", "wrong gradient", "failing"],
)  # fmt: skip
def test_a_wrong_kernel_fails_its_trial(monkeypatch, kernel, problem):
    monkeypatch.setattr(attention_trial, "varlen_attention", kernel)
    assert problem in trial("torch_varlen", CPU, torch.float32, 64)


@pytest.mark.parametrize("name", ["flash_attention_3", "flash_attention_4"])
def test_a_package_that_is_not_there_fails_its_trial_and_leaves_nothing(name):
    assert "ModuleNotFoundError" in trial(name, CPU, torch.float32, 64)
    assert torch.nn.attention.current_flash_attention_impl() is None


def test_a_package_is_switched_off_again(monkeypatch):
    class Handle:
        removed = False

        def remove(self):
            self.removed = True

    handle = Handle()
    monkeypatch.setitem(_registry._FLASH_ATTENTION_IMPLS, "FA3", lambda: handle)
    with switched_on("flash_attention_3"):
        assert torch.nn.attention.current_flash_attention_impl() == "FA3"
    assert torch.nn.attention.current_flash_attention_impl() is None
    assert handle.removed


def test_attention_that_is_not_kept_ends_the_run(tiny_moe):
    patched = ["scatter_moe_recompute", "router_aux_loss"]
    monkey_patch.apply_patches(tiny_moe, patched)
    monkey_patch.router_statistics(tiny_moe).coefficient = 0
    seen = enable_checkpointing(tiny_moe.train(), {"selective": tiny_moe.config.num_hidden_layers})
    seen.check("sdpa")  # nothing has run
    ids = torch.arange(8)[None]
    tiny_moe.set_attn_implementation("eager")  # products and a softmax of its own
    tiny_moe(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    with pytest.raises(ModelError, match=r"keeps no result of attention 'eager'.*torch_varlen"):
        seen.check("eager")
    tiny_moe.set_attn_implementation("sdpa")
    tiny_moe(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    seen.check("sdpa")


def test_a_graph_from_a_cache_is_not_blamed():
    SeenOperators(ran=False).check("torch_varlen")

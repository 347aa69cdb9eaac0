import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from monkey_patch import PATCHES, Patch, PatchError, Replacement, apply_patches


class _Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class _Config:
    def __init__(self):
        self._mode = "plain"

    @property
    def mode(self):
        return self._mode

    @mode.setter
    def mode(self, value):
        if value == "forbidden":
            raise RuntimeError("cannot set mode")
        self._mode = value


def _net():
    net = nn.Sequential(nn.Sequential(nn.Linear(3, 3)), nn.Linear(3, 3))
    net.config = _Config()
    return net


def _patch(name, *targets, requires=()):
    """A patch of (path of the owner, attribute, new value) triples."""

    def plan(model):
        for path, attr, new in targets:
            owner = model.config if path == "config" else model.get_submodule(path)
            yield Replacement(owner, attr, new, path or "model")

    return Patch(name, "test", requires, plan, 0.0, "none")


def _state(net):
    return [(n, id(m), dict(vars(m))) for n, m in net.named_modules()], vars(net.config).copy()


def test_applies_counts_and_restores_every_kind_of_attribute():
    net = _net()
    before = _state(net)
    doubled = _Doubled(3, 3)
    patch = _patch(
        "all", ("", "1", doubled), ("0.0", "forward", torch.zeros_like), ("config", "mode", "fast")
    )
    with apply_patches(net, [patch]) as applied:
        assert applied.names == ("all",)
        assert applied.counts == {"all": 3}
        assert repr(applied) == "<patches of Sequential: all: 3>"
        assert net[1] is doubled
        assert list(net._modules) == ["0", "1"]
        assert net.config.mode == "fast"
        assert torch.equal(net(torch.ones(1, 3)), 2 * doubled.bias[None])
    vars(net).pop("_applied_patches")
    assert _state(net) == before
    applied.revert()


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (("0.0", "forward", abs), "'a' and 'b' both replace 0.0.forward"),
        (("", "0", nn.Identity()), "'b' replaces model.0, inside of which 'a' replaces forward"),
    ],
)
@pytest.mark.parametrize("together", [True, False])
def test_conflicts_name_both_patches_and_change_nothing(second, message, together):
    net = _net()
    a, b = _patch("a", ("0.0", "forward", torch.zeros_like)), _patch("b", second)
    if together:
        before = _state(net)
        with pytest.raises(PatchError, match=message):
            apply_patches(net, [a, b])
        assert _state(net) == before
    else:
        with apply_patches(net, [a]), pytest.raises(PatchError, match=message):
            apply_patches(net, [b])


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        (_patch("none"), "'none' matches nothing in Sequential"),
        (_patch("old", ("", "1", None), requires=("torch<2",)), r"'old' needs torch<2 \(found 2"),
        (_patch("gone", requires=("no-such-dist",)), r"needs no-such-dist \(not installed\)"),
        (_patch("typo", ("0.0", "forwards", abs)), "0.0 has no attribute 'forwards'"),
        ("scatter_mo", "unknown patch 'scatter_mo'; there are scatter_moe, "),
    ],
)
def test_refusals(patch, message):
    net = _net()
    before = _state(net)
    with pytest.raises(PatchError, match=message):
        apply_patches(net, [patch])
    assert _state(net) == before


def test_a_failure_half_way_undoes_what_was_done():
    net = _net()
    before = _state(net)
    patch = _patch("a", ("", "1", nn.Identity()), ("config", "mode", "forbidden"))
    with pytest.raises(RuntimeError, match="cannot set mode"):
        apply_patches(net, [patch])
    assert _state(net) == before


def test_twice_is_an_error_also_on_a_copy_and_through_a_wrapper():
    net = _net()
    patch = _patch("a", ("0.0", "forward", torch.zeros_like))
    applied = apply_patches(net, [patch])
    for patched in (net, copy.deepcopy(net), nn.Sequential(net)):
        patched.config = net.config
        with pytest.raises(PatchError, match="'a' is already applied"):
            apply_patches(patched, [patch])
    with pytest.raises(PatchError, match="'a' is already applied"):
        apply_patches(_net(), [patch, patch])
    applied.revert()
    apply_patches(net, [patch]).revert()


def test_revert_refuses_when_somebody_changed_the_attribute_since():
    net = _net()
    applied = apply_patches(net, [_patch("a", ("0.0", "forward", abs), ("", "1", nn.Identity()))])
    identity, net[1] = net[1], nn.Linear(3, 3)
    with pytest.raises(PatchError, match=r"model.1 was changed after patching"):
        applied.revert()
    assert vars(net[0][0])["forward"] is abs
    net[1] = identity
    applied.revert()


def test_importing_changes_nothing_and_loads_no_heavy_package():
    code = (
        "import sys, torch; of_torch = set(sys.modules); import monkey_patch; "
        "heavy = {'transformers', 'triton', 'trl', 'qwen3_sft'}; "
        "sys.exit(', '.join(heavy & set(sys.modules) - of_torch) or 0)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_patches_are_documented():
    assert len({patch.name for patch in PATCHES}) == len(PATCHES)
    for patch in PATCHES:
        assert patch.summary
        assert patch.upstream
        assert patch.requires
        assert patch.unmet() == []


def test_some_patches_pause_and_come_back():
    net = _net()
    before = _state(net)
    fast = _patch("fast", ("config", "mode", "fast"))
    zeros = _patch("zeros", ("0.0", "forward", torch.zeros_like))
    applied = apply_patches(net, [fast, zeros])
    patched = _state(net)
    with applied.paused("zeros", "not applied"):
        assert net.config.mode == "fast"
        assert "forward" not in vars(net[0][0])
    assert _state(net) == patched
    with applied.paused("fast", "zeros"):
        assert net.config.mode == before[1]["_mode"]
        assert "forward" not in vars(net[0][0])
    assert _state(net) == patched
    assert applied.counts == {"fast": 1, "zeros": 1}

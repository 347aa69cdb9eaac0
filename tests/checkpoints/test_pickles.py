"""Pickles are read without running them, and what our own files hold is known."""

import contextlib
import copyreg
import functools
import importlib
import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torchao.optim.subclass_4bit import OptimState4bit
from torchao.optim.subclass_8bit import OptimState8bit
from torchao.optim.subclass_fp8 import OptimStateFp8

from qwen3_sft.checkpoints import pickles as inert_pickle
from qwen3_sft.checkpoints.pickles import IN_ARCHIVES, IN_METADATA, StandIn, read_inert
from qwen3_sft.checkpoints.trust import refuse_foreign_code
from qwen3_sft.errors import CheckpointError, RefusedPickleError
from tests.support.planted import Attack

load_unchecked = functools.partial(torch.load, weights_only=False)


@pytest.fixture
def attack(tmp_path):
    return Attack(tmp_path / "ran")


def test_every_planted_pickle_runs_where_nobody_looks(attack, tmp_path):
    """So that the tests of checkpoints are known to be able to fail."""
    file = tmp_path / "file.pt"
    for name, payload in attack.payloads().items():
        with contextlib.suppress(Exception):
            pickle.loads(payload)
        with contextlib.suppress(Exception):
            file.write_bytes(payload)
            load_unchecked(file)
        assert attack.ran(), name


def test_extension_codes_are_refused(attack):
    """They name a callable in a registry of the process, past the look-up of names."""
    copyreg.add_extension("posix", "system", 240)
    try:
        payload = pickle.dumps(attack, 2)
        assert b"\x82\xf0" in payload
        pickle.loads(payload)  # now the registry has the function itself
        assert attack.ran()
        with pytest.raises(RefusedPickleError, match="opcode"):
            read_inert(payload, IN_ARCHIVES)
        assert not attack.ran()
    finally:
        copyreg.remove_extension("posix", "system", 240)
        copyreg.clear_extension_cache()


QUANTISED = {
    "8bit": OptimState8bit.zeros((64, 128)),
    "4bit": OptimState4bit.zeros((64, 128)),
    "fp8": OptimStateFp8.zeros((64, 128)),
}


@pytest.mark.parametrize("states", QUANTISED)
def test_quantised_optimizer_states_are_known(states, tmp_path):
    state = {"state": {0: {"step": torch.tensor(1.0), "exp_avg": QUANTISED[states]}}}
    torch.save(state, tmp_path / "optimizer.pt")
    refuse_foreign_code(tmp_path, trusted=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_states_of_every_dtype_are_known(dtype, tmp_path):
    parameter = torch.nn.Parameter(torch.zeros(3, dtype=dtype), requires_grad=False)
    state = {"a": torch.zeros(2, dtype=dtype), "b": parameter, "c": torch.Size([1])}
    torch.save(state, tmp_path / "optimizer.pt")
    random = np.random.default_rng(0).bit_generator.state
    torch.save({"numpy": np.random.get_state(), "more": random}, tmp_path / "rng_state.pth")
    refuse_foreign_code(tmp_path, trusted=False)


def test_a_stand_in_does_nothing():
    data = pickle.dumps({"x": torch.float32, "y": OrderedDict(a=[1, (2, 3)])}, 2)
    values = read_inert(data, IN_ARCHIVES)
    assert type(values["y"]).__mro__[1] is StandIn
    assert values["y"].state is None


@pytest.mark.parametrize(
    "data",
    [
        pickle.dumps({((1, 2), 3): 4}), pickle.dumps({1, 2}), b"\x80\x04]]s.", b"\x80\x04.", b"",
        b"\x80\x04K\x01", b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.", b"garbage",
        pickle.dumps(StandIn, 4)[:-1] + b"}b.", b"\x80\x04K\x01K\x02\x93.",
    ],
)  # fmt: skip
def test_malformed_and_odd_pickles_are_refused(data):
    with pytest.raises(RefusedPickleError):
        read_inert(data, {"qwen3_sft.checkpoints.pickles": {"StandIn"}})


def test_pickles_are_limited_in_size(monkeypatch, tmp_path):
    monkeypatch.setattr(inert_pickle, "MAX_OPCODES", 1000)
    read_inert(b"\x80\x04" + b"]" * 900 + b".", IN_ARCHIVES)
    with pytest.raises(RefusedPickleError, match=r"more than 1,000 opcodes"):
        read_inert(b"\x80\x04" + b"]" * 1100 + b".", IN_ARCHIVES)
    # One byte asks for room for two billion entries of a list, in the C interpreter of pickles.
    read_inert(b"\x80\x04]r\xff\xff\xff\x7f.", IN_ARCHIVES)
    monkeypatch.setattr("qwen3_sft.checkpoints.trust.MAX_PICKLE_BYTES", 1000)
    torch.save({"x": "y" * 2000}, tmp_path / "optimizer.pt")
    with pytest.raises(CheckpointError, match=r"holds a pickle of 2,\d+ bytes"):
        refuse_foreign_code(tmp_path, trusted=False)


def test_only_these_functions_may_be_called():
    """All other names are types; none of these imports, calls or unpickles its arguments."""
    tables = [(m, n) for table in (IN_ARCHIVES, IN_METADATA) for m in table for n in table[m]]
    functions = {
        f"{module}.{name}"
        for module, name in tables
        if not module.startswith(("deepspeed", "pathlib._local", "numpy.core"))
        and not isinstance(getattr(importlib.import_module(module), name), type | torch.dtype)
    }
    assert functions == {
        "_codecs.encode", "numpy._core.multiarray._reconstruct", "torch.serialization._get_layout",
        "torch._tensor._rebuild_from_type_v2", "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3",
        "torch._utils._rebuild_wrapper_subclass",
    }  # fmt: skip

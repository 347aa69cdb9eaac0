"""Where the processes of a run meet on one machine, and who is told of a port in use."""

import socket

import pytest

from qwen3_sft.errors import UsageError
from qwen3_sft.launch.port import port_flags, require_free


@pytest.fixture
def taken():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_a_port_in_use_is_told_by_its_name(taken):
    with pytest.raises(UsageError, match=f"^MASTER_PORT {taken} .*in use.*set another MASTER_PORT"):
        port_flags({}, {"MASTER_PORT": str(taken)})
    with pytest.raises(UsageError, match=f"^main_process_port of the launch file {taken} "):
        port_flags({"main_process_port": taken}, {})
    with pytest.raises(UsageError, match="cannot be used"):
        require_free(taken, "MASTER_PORT")


def test_a_free_one():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        free = listener.getsockname()[1]
    assert port_flags({}, {"MASTER_PORT": str(free)}) == ["--main_process_port", str(free)]
    assert port_flags({"main_process_port": free}, {}) == [], "the file says it already"
    assert port_flags({}, {}) == ["--main_process_port", "0"], "accelerate looks for one"
    assert port_flags({"num_machines": 2}, {"MASTER_PORT": str(free)}) == []

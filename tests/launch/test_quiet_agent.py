"""A launcher's own traceback is left out where a worker has said what is wrong."""

import sys

import pytest

from qwen3_sft.launch.quiet_agent import main, quiet

FAILS = """
import sys
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
import logging
logging.getLogger("torch.distributed.elastic.multiprocessing.api").error("failed (exitcode: 2)")
assert __name__ == "__main__" and sys.argv[1:] == ["--x"], sys.argv
raise LINE
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
    def write(line: str) -> list[str]:
        (tmp_path / "a_launcher.py").write_text(FAILS.replace("LINE", line))
        return ["a_launcher", "--x"]

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    return write


def test_a_failed_worker(program, tmp_path, monkeypatch, capsys):
    words = program('ChildFailedError("train", {0: ProcessFailure(0, 1, -9, "none")})')
    exit_file = tmp_path / "exit_code"
    monkeypatch.setenv("QWEN3_SFT_EXIT_FILE", str(exit_file))
    assert main(words) == 1
    assert "train FAILED" in capsys.readouterr().err, "killed, and nobody has said why"
    exit_file.write_text("2")
    assert main(words) == 1
    assert capsys.readouterr() == ("", "")


def test_a_signal_and_a_bug(program):
    assert main(program('SignalException("x", 2)')) == 130
    with pytest.raises(KeyError):
        main(program('KeyError("a bug")'))


def test_the_command():
    assert quiet(["py", "-m", "torch.distributed.run", "--x"]) == [
        "py", "-m", "qwen3_sft.launch.quiet_agent", "torch.distributed.run", "--x",
    ]  # fmt: skip

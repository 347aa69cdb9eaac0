"""Errors become a message and an exit code at one place; what is not foreseen is a traceback."""

from __future__ import annotations

import errno
import os
import signal

import pytest

from qwen3_sft.errors import (
    DataError,
    ModelError,
    UsageError,
    exit_code_of,
    said,
    told_as,
    unless_stopped,
)


def ends(error: BaseException) -> tuple[int, list[str]]:
    said: list[str] = []

    def work() -> int:
        raise error

    return exit_code_of(work, said.append), said


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.EACCES, 2), (errno.EROFS, 2), (errno.ENAMETOOLONG, 2), (errno.EISDIR, 2),
        (errno.ENOTDIR, 2), (errno.ENOSPC, 1), (errno.EDQUOT, 1), (errno.EIO, 1),
    ],
)  # fmt: skip
def test_what_the_machine_refuses(number, code):
    error = OSError(number, os.strerror(number), "/a/file")
    assert ends(error) == (code, [f"error: /a/file: {os.strerror(number)}"])
    assert ends(OSError(number, os.strerror(number))) == (code, [f"error: {os.strerror(number)}"])


@pytest.mark.parametrize(
    "error",
    [FileNotFoundError(errno.ENOENT, "no", "f"), OSError("odd"), KeyError("a"), TypeError()],
)
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        ends(error)


def test_a_library_s_error_becomes_ours():
    expected = pytest.raises(ModelError, match=r"^a/file: not this$")
    with expected as caught, told_as(ModelError, "a/file", KeyError, ValueError):
        raise ValueError("not\n this")
    assert isinstance(caught.value.__cause__, ValueError)
    with pytest.raises(UsageError, match=r"^ours$"), told_as(ModelError, "a/file", ValueError):
        raise UsageError("ours")
    with pytest.raises(TypeError), told_as(DataError, "a/file", ValueError):
        raise TypeError


def test_words_are_short():
    assert len(said(ValueError("x" * 9_999))) == 500
    assert said(ValueError()) == "ValueError"
    assert said(OSError(errno.EIO, "Input/output error", "f")) == "Input/output error"


def test_ctrl_c_is_one_line_and_a_second_one_is_short():
    before = signal.getsignal(signal.SIGINT)
    lines: list[str] = []

    def work() -> int:
        signal.raise_signal(signal.SIGINT)
        return 0

    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert unless_stopped(work, lines.append) == 130
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL, "no traceback at the very end"
    finally:
        signal.signal(signal.SIGINT, before)
    assert lines == ["stopped by Ctrl-C"]

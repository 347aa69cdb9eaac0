"""What several processes of a node have to say alike is said once."""

import threading

import pytest

from qwen3_sft.logs import once_per_node


@pytest.fixture
def said(tmp_path, monkeypatch):
    """What the processes of a launch say, with their local rank."""
    heard = []

    def say(rank, text, exit_file=str(tmp_path / "exit_code")):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        once_per_node(lambda words: heard.append((rank, words)), exit_file)(text)
        return heard

    return say


def test_the_same_words_are_said_once_and_others_all_the_same(said):
    said(0, "error: both")
    said(1, "error: both")
    assert said(1, "error: mine alone") == [(0, "error: both"), (1, "error: mine alone")]


def test_a_second_attempt_speaks_again(said, monkeypatch):
    said(0, "error: both")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert len(said(0, "error: both")) == 2


def test_the_first_process_is_waited_for(said, monkeypatch):
    later = threading.Thread(target=said, args=(1, "error: both"))
    later.start()
    said(0, "error: both")
    later.join()
    assert len(said(0, "error: both")) == 1


def test_without_our_launcher_every_process_speaks(said):
    said(0, "error: both", exit_file=None)
    assert len(said(1, "error: both", exit_file=None)) == 2

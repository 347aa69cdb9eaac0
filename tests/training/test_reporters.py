import socket

import pytest
from transformers import TrainerCallback

from qwen3_sft.training.reporters import MAX_FAILURES, guard, guard_reporters
from tests.support.faults import outcome
from tests.support.training import make_trainer, weights


class Uploader(TrainerCallback):
    """Sends every record to a port; whoever listens there is `server`."""

    def __init__(self, port):
        self.port, self.calls = port, 0

    def on_log(self, args, state, control, **kwargs):
        self.calls += 1
        socket.create_connection(("127.0.0.1", self.port), timeout=5).close()


@pytest.fixture
def server():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


@outcome(
    "W&B, MLflow or another reporter fails",
    "a warning; after three in a row training goes on without it",
)
def test_a_server_that_is_down_costs_warnings_and_no_step(tiny_moe, tokenizer, tmp_path, caplog):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    plain = make_trainer(tiny_moe, tokenizer, tmp_path / "a", max_steps=5)
    plain.train()
    uploader = Uploader(port)
    guard(uploader)
    watched = make_trainer(tiny_moe, tokenizer, tmp_path / "b", max_steps=5, callbacks=(uploader,))
    with caplog.at_level("WARNING", logger="qwen3_sft"):
        watched.train()
    assert watched.state.global_step == 5
    final = weights(plain.model)
    assert all(tensor.equal(final[name]) for name, tensor in weights(watched.model).items())
    failures = [r.message for r in caplog.records if "Uploader failed in on_log" in r.message]
    assert len(failures) == uploader.calls == MAX_FAILURES
    assert "ConnectionRefusedError" in failures[0]
    assert "training goes on without it" in failures[-1]
    assert "without it" not in failures[0]


def test_a_server_that_comes_back_is_used_again(server, caplog):
    uploader = Uploader(server.getsockname()[1])
    guard(uploader)
    good, bad = uploader.port, 1  # nobody listens on port 1
    for _ in range(3):
        for uploader.port in (bad, bad, good):
            uploader.on_log(None, None, None)
    assert uploader.calls == 9
    assert caplog.text.count("training goes on") == 6
    assert "without it" not in caplog.text


def test_only_failures_are_swallowed():
    class Interrupting(TrainerCallback):
        def on_log(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    callback = Interrupting()
    guard(callback)
    with pytest.raises(KeyboardInterrupt):
        callback.on_log(None, None, None)


def test_reporters_of_a_run_are_guarded_and_nobody_else_is(
    tiny_moe, tokenizer, tmp_path, caplog, monkeypatch
):
    """TensorBoard's files cannot be made below a file, and the run does not mind."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "file" / "below"))
    trainer = make_trainer(tiny_moe, tokenizer, tmp_path, max_steps=5, report_to=["tensorboard"])
    guarded = guard_reporters(trainer.callback_handler.callbacks)
    assert [type(callback).__name__ for callback in guarded] == ["TensorBoardCallback"]
    with caplog.at_level("WARNING", logger="qwen3_sft"):
        trainer.train()
    assert trainer.state.global_step == 5
    assert "TensorBoardCallback failed in on_train_begin (NotADirectoryError" in caplog.text

"""A signal ends training with a checkpoint, and the run goes on as if there had been none."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time

import pytest
import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from qwen3_sft.checkpoints.manifest import verify
from qwen3_sft.errors import CheckpointError, Interrupted
from qwen3_sft.run import run_command
from tests.support.commands import metrics
from tests.support.run_inputs import write_inputs
from tests.support.training import Documents, make_trainer, weights

STEPS = 5
RUN = {"max_steps": STEPS, "gradient_accumulation_steps": 2}
# Attention of the tiny model drops out only where it is not replaced.
DROPPING = ("scatter_moe", "router_aux_loss", "linear_cross_entropy")
PLAIN = ("router_aux_loss",)


@pytest.fixture(autouse=True)
def former():
    """Handlers as before; inside a test, what a signal would do is recorded."""
    came = []
    before = {
        n: signal.signal(n, lambda number, _: came.append(number))
        for n in (signal.SIGTERM, signal.SIGUSR1)
    }
    yield came
    for number, handler in before.items():
        signal.signal(number, handler)


class Sends(TrainerCallback):
    """Send a signal to this process at one event of one step; record which events came."""

    def __init__(self, event, step, number=signal.SIGTERM):
        self.seen = []
        for name in ("on_substep_end", "on_step_end", "on_log", "on_evaluate", "on_save",
                     "on_train_end", "on_epoch_end"):  # fmt: skip
            setattr(self, name, self._handler(name, event, step, number))

    def _handler(self, name, event, step, number):
        def handle(args, state, control, **kwargs):
            self.seen.append((name, state.global_step))
            if (name, state.global_step) == (event, step):
                os.kill(os.getpid(), number)

        return handle

    def steps_of(self, name):
        return [step for event, step in self.seen if event == name]


def interrupted(model, tokenizer, folder, sends, **values):
    """Train until the signal; return the message."""
    trainer = make_trainer(model, tokenizer, folder, callbacks=(sends,), **(RUN | values))
    with pytest.raises(Interrupted) as caught:
        trainer.train()
    return str(caught.value)


def losses(trainer):
    return [(h["step"], h["loss"]) for h in trainer.state.log_history if "loss" in h]


def checkpoints(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def test_resumed_run_equals_the_uninterrupted_one(tiny_moe, tokenizer, tmp_path):
    values = RUN | {"patches": DROPPING, "save_strategy": "no"}
    without = make_trainer(tiny_moe, tokenizer, tmp_path / "eval", **(values | {"max_steps": 1}))
    without.train()
    for layer in tiny_moe.model.layers:
        layer.self_attn.attention_dropout = 0.3
    whole = make_trainer(tiny_moe, tokenizer, tmp_path / "whole", **values)
    whole.train()
    assert losses(without)[0] != losses(whole)[0], "nothing drops out"

    # Between the two micro-batches of the third step.
    folder = tmp_path / "run"
    sends = Sends("on_substep_end", 2)
    message = interrupted(tiny_moe, tokenizer, folder, sends, **values)
    assert message.startswith(f"interrupted by SIGTERM at step 3: saved {folder}/checkpoint-3")
    assert message.endswith("the same command goes on from it (exit code 75)")
    assert checkpoints(folder) == ["checkpoint-3"]
    verify(folder / "checkpoint-3")
    assert json.loads((folder / "INTERRUPTED").read_text()) == {
        "signal": "SIGTERM", "step": 3, "checkpoint": str(folder / "checkpoint-3"),
        "to go on": "start the same command again",
    }  # fmt: skip
    assert sends.steps_of("on_train_end") == []
    resumed = make_trainer(tiny_moe, tokenizer, folder, **values)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    assert not (folder / "INTERRUPTED").exists()
    assert losses(resumed) == losses(whole)
    expected = weights(whole.model)
    for name, tensor in weights(resumed.model).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(
    ("values", "sent", "evaluated"),
    [
        ({"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 3},
         2, [3]),
        ({"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2,
          "load_best_model_at_end": True, "save_total_limit": 1}, 2, [2]),
        ({"save_strategy": "best", "metric_for_best_model": "eval_label_tokens",
          "eval_strategy": "steps", "eval_steps": 1}, 2, [1, 2, 3]),
        # An epoch has two steps: in the middle of the second one, at the end of the first.
        ({"save_strategy": "epoch", "eval_strategy": "epoch"}, 2, [2]),
        ({"save_strategy": "best", "metric_for_best_model": "eval_label_tokens",
          "eval_strategy": "epoch"}, 1, [2]),
        ({"save_strategy": "no"}, STEPS - 1, []),
    ],
    ids=["save and evaluation", "best is another", "best only", "in an epoch", "end of an epoch",
         "last step"],
)  # fmt: skip
def test_a_step_is_saved_once(tiny_moe, tokenizer, tmp_path, values, sent, evaluated):
    documents = Documents(8, len(tokenizer), seed=3)
    held_out = Documents(4, len(tokenizer), seed=5)
    sends = Sends("on_substep_end", sent)
    interrupted(
        tiny_moe, tokenizer, tmp_path, sends, documents=documents, eval_documents=held_out,
        **values,
    )  # fmt: skip
    assert sends.steps_of("on_save").count(sent + 1) == 1
    assert sends.steps_of("on_evaluate") == evaluated
    assert sends.steps_of("on_train_end") == []
    verify(tmp_path / f"checkpoint-{sent + 1}")
    state = json.loads((tmp_path / f"checkpoint-{sent + 1}" / "trainer_state.json").read_text())
    logged = [h["step"] for h in state["log_history"] if "eval_loss" in h]
    assert logged == evaluated, "the checkpoint does not know of an evaluation"


@pytest.mark.parametrize(
    ("save_strategy", "event"), [("no", "on_step_end"), ("steps", "on_epoch_end")]
)
def test_a_signal_after_the_last_agreement_saves_as_well(
    tiny_moe, tokenizer, tmp_path, save_strategy, event
):
    """As during the last checkpoint, which may take minutes."""
    sends = Sends(event, 2)
    values = {"max_steps": 2, "save_strategy": save_strategy, "patches": PLAIN}
    interrupted(tiny_moe, tokenizer, tmp_path, sends, **values)
    assert sends.steps_of("on_save") == [2]
    assert sends.steps_of("on_train_end") == []
    assert checkpoints(tmp_path) == ["checkpoint-2"]
    # What is left is the export: nothing is trained.
    trainer = make_trainer(tiny_moe, tokenizer, tmp_path, **(RUN | values))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert (trainer.state.global_step, metrics(tmp_path)) == (2, [])


class SignalledWhileSaving(TrainerCallback, ExportableState):
    """Its state is asked for in the middle of a save."""

    def __init__(self):
        self.is_armed = False

    def on_step_end(self, args, state, control, **kwargs):
        self.is_armed = state.global_step == 3

    def state(self):
        if self.is_armed:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGUSR1)
        return {"args": {}, "attributes": {}}


def test_a_second_signal_during_the_save_is_ignored(tiny_moe, tokenizer, tmp_path, caplog, former):
    sends = Sends("on_substep_end", 2)
    trainer = make_trainer(
        tiny_moe,
        tokenizer,
        tmp_path,
        callbacks=(sends, SignalledWhileSaving()),
        patches=PLAIN,
        **RUN,
    )
    with pytest.raises(Interrupted, match="interrupted by SIGTERM at step 3"):
        trainer.train()
    verify(tmp_path / "checkpoint-3")
    assert "2 more signals came and were ignored" in caplog.text
    os.kill(os.getpid(), signal.SIGTERM)  # the process ends with 75, not by a late signal
    assert former == []


def test_handlers_are_put_back(tiny_moe, tokenizer, tmp_path, former):
    seen = []

    class Looks(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            os.kill(os.getpid(), signal.SIGTERM)
            seen.append(list(former))

        def on_train_end(self, args, state, control, **kwargs):
            os.kill(os.getpid(), signal.SIGUSR1)
            seen.append(list(former))

    make_trainer(
        tiny_moe, tokenizer, tmp_path, callbacks=(Looks(),), patches=PLAIN, max_steps=1
    ).train()
    assert seen == [[signal.SIGTERM], [signal.SIGTERM, signal.SIGUSR1]]


def test_a_failed_save_is_told_as_such(tiny_moe, tokenizer, tmp_path, former):
    """And handlers are put back after this, as after any exception."""

    class Spoils(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            model.lm_head.weight.data[0] = torch.nan
            os.kill(os.getpid(), signal.SIGTERM)

    trainer = make_trainer(
        tiny_moe, tokenizer, tmp_path, callbacks=(Spoils(),), patches=PLAIN, max_steps=1
    )
    with pytest.raises(CheckpointError, match="NaN or Inf"):
        trainer.train()
    assert checkpoints(tmp_path) == []
    os.kill(os.getpid(), signal.SIGTERM)
    assert former == [signal.SIGTERM]


def test_a_command_ends_with_75_and_goes_on(tokenizer, tmp_path, caplog):
    out = tmp_path / "run"
    command = [
        *write_inputs(tmp_path, tokenizer), "--output_dir", out, "--max_length", 64,
        "--max_steps", 100, "--num_train_epochs", 100, "--use_cpu", "true", "--num_samples", 0,
        "--save_strategy", "no", "--learning_rate", "1e-3", "--lr_scheduler_type", "constant",
    ]  # fmt: skip
    command = [str(word) for word in command]

    def send():
        while not (out / "metrics.jsonl").is_file() or len(metrics(out)) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGUSR1)

    thread = threading.Thread(target=send)
    thread.start()
    with caplog.at_level("INFO", logger="qwen3_sft"):
        assert run_command(command) == 75
        thread.join()
        done = len(metrics(out))
        assert 2 <= done < 100
        assert (
            f"interrupted by SIGUSR1 at step {done}: saved {out}/checkpoint-{done}" in caplog.text
        )
        assert (out / "INTERRUPTED").is_file()
        assert not (out / "model").exists()
        command[command.index("100")] = str(done + 2)
        assert run_command(command) == 0
    assert f"resuming from {out / f'checkpoint-{done}'}" in caplog.text
    assert [record["step"] for record in metrics(out)] == list(range(1, done + 3))
    assert not (out / "INTERRUPTED").exists()
    assert (out / "summary.json").is_file()
    shutil.rmtree(out)

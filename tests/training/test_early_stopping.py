import json

import pytest
import torch

from qwen3_sft.records.run_folder import RunFolder
from qwen3_sft.training.callbacks import EarlyStopping
from qwen3_sft.training.summary import describe_summary, write_summary
from tests.support.training import Documents, make_trainer, weights


@pytest.fixture
def trainer(tiny_moe, tokenizer, tmp_path):
    """Make trainers that learn by heart, far too fast."""
    return lambda patience: make_trainer(
        tiny_moe, tokenizer, tmp_path, eval_documents=Documents(3, len(tokenizer), seed=9),
        max_steps=40, learning_rate=0.05, save_strategy="steps", save_steps=2,
        eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, save_total_limit=None,
        early_stopping_patience=patience, callbacks=(EarlyStopping(),),
    )  # fmt: skip


def eval_losses(trainer):
    return [h["eval_loss"] for h in trainer.state.log_history if "eval_loss" in h]


def test_it_ends_the_run_at_the_best_and_says_so(trainer, tmp_path):
    stopped = trainer(2)
    stopped.train()
    losses = eval_losses(stopped)
    assert stopped.state.global_step == 2 * len(losses) < 40
    assert min(losses) == losses[-3] < min(losses[-2:])
    assert stopped.evaluate()["eval_loss"] == losses[-3]
    folder = RunFolder(tmp_path)
    folder.samples.write_text("")
    words = f"in {2 * len(losses)} steps, stopped early: evaluations did not improve, model in"
    assert words in write_summary(stopped, folder, {})
    assert words[3:40] in describe_summary(folder, folder.summary() or {})


def test_a_resume_counts_on_and_what_had_stopped_stops_again(trainer, tmp_path):
    """As after a run that was killed between its last step and the end of its export."""
    stopped = trainer(2)
    stopped.train()
    best, losses, step = weights(stopped.model), eval_losses(stopped), stopped.state.global_step
    for before in (0, 2):  # the first goes on to the evaluation that stops it
        again = trainer(2)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step - before}"))
        assert again.state.global_step == step
        assert eval_losses(again) == losses
        for name, tensor in weights(again.model).items():
            assert torch.equal(tensor, best[name]), name
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert max(record["step"] for record in records) == step


def test_more_patience_lets_a_stopped_run_go_on(trainer, tmp_path):
    stopped = trainer(2)
    stopped.train()
    step = stopped.state.global_step
    more = trainer(3)
    more.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert more.state.global_step == step + 2

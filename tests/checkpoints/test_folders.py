import json

import pytest
import safetensors.torch
import torch
from transformers import TrainerCallback

from qwen3_sft.checkpoints.folders import newest_verified
from qwen3_sft.checkpoints.ledger import Ledger
from qwen3_sft.checkpoints.manifest import verify
from qwen3_sft.checkpoints.sharded import (
    load_optimizer,
    load_scheduler,
    load_sharded_weights,
    save_weights,
    saved_names,
)
from qwen3_sft.checkpoints.whole import load_weights
from qwen3_sft.errors import CheckpointError, ModelError
from tests.support.training import Documents, make_trainer, weights

RUN = {
    "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 3, "save_total_limit": 9,
    "gradient_accumulation_steps": 2, "max_grad_norm": 1.0, "lr_scheduler_type": "cosine",
    "warmup_steps": 2, "aux": 0.01,
}  # fmt: skip


def test_upstream_still_drops_the_experts_on_resume(tiny_moe, tokenizer, tmp_path):
    # transformers issue 48805. When this fails, `_load_from_checkpoint` can go.
    trainer = make_trainer(tiny_moe, tokenizer, tmp_path, **RUN | {"max_steps": 3})
    trainer.train()
    saved = safetensors.torch.load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    missing = tiny_moe.load_state_dict(saved, strict=False).missing_keys
    assert any("experts.gate_up_proj" in key for key in missing)


def test_best_checkpoint_is_restored_with_its_experts(tiny_moe, tokenizer, tmp_path):
    class _Spoil(TrainerCallback):
        @torch.no_grad()
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 4:
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter))

    trainer = make_trainer(
        tiny_moe, tokenizer, tmp_path, eval_documents=Documents(4, len(tokenizer), seed=3),
        max_steps=6, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, metric_for_best_model="loss", save_total_limit=1,
        callbacks=(_Spoil(),),
    )  # fmt: skip
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "model.safetensors").write_text("the user's own")
    trainer.train()
    evaluations = {h["step"]: h["eval_loss"] for h in trainer.state.log_history if "eval_loss" in h}
    best = min(evaluations, key=evaluations.__getitem__)
    assert best == 4
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert trainer.evaluate()["eval_loss"] == evaluations[best]
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-4"}
    assert trainer.args.save_total_limit == 1
    state = json.loads((tmp_path / f"checkpoint-{best}" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / f"checkpoint-{best}")


@pytest.fixture
def saved(tiny_moe, tokenizer, tmp_path):
    trainer = make_trainer(tiny_moe, tokenizer, tmp_path, **RUN | {"max_steps": 6})
    trainer.train()
    return tmp_path, trainer


def test_damaged_checkpoints_are_passed_over(saved):
    folder, _ = saved
    newest = folder / "checkpoint-6"
    assert newest_verified(folder) == (newest, [])
    assert not (newest / "training_args.bin").exists()
    weights_file = newest / "model.safetensors"
    data = bytearray(weights_file.read_bytes())
    data[-1] ^= 1
    weights_file.write_bytes(data)
    found, reasons = newest_verified(folder)
    assert found == folder / "checkpoint-3"
    assert "model.safetensors: content differs" in reasons[0]
    weights_file.write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match="bytes, the manifest says"):
        verify(newest)
    weights_file.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: missing"):
        verify(newest)
    (newest / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="did not finish"):
        verify(newest)


def test_missing_optimizer_is_an_error(saved, tiny_moe, tokenizer):
    folder, _ = saved
    (folder / "checkpoint-6" / "optimizer.pt").unlink()
    trainer = make_trainer(tiny_moe, tokenizer, folder, **RUN)
    with pytest.raises(CheckpointError, match=r"optimizer\.pt"):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-6"))


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_a_checkpoint_that_does_not_fit_is_refused(saved, change):
    folder, trainer = saved
    file = folder / "checkpoint-6" / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    key = "model.layers.1.mlp.experts.3.down_proj.weight"
    if change == "missing":
        del tensors[key]
    elif change == "unexpected":
        tensors["model.layers.1.extra.weight"] = torch.zeros(2)
    else:
        tensors["lm_head.weight"] = torch.zeros(3, 64)
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises((ModelError, RuntimeError)):
        load_weights(trainer.model, folder / "checkpoint-6")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("tied", [False, True])
def test_shards_hold_the_names_of_the_model_and_no_others(tiny_moe, tmp_path, tied):
    if tied:
        tiny_moe.lm_head.weight = tiny_moe.model.embed_tokens.weight
    save_weights(tiny_moe, tmp_path, Ledger(tmp_path))
    assert saved_names(tmp_path) == tiny_moe.state_dict().keys()
    before = weights(tiny_moe)
    with torch.no_grad():
        for parameter in tiny_moe.parameters():
            parameter.zero_()
    load_sharded_weights(tiny_moe, tmp_path)
    assert all(tensor.equal(before[name]) for name, tensor in weights(tiny_moe).items())
    router = tiny_moe.model.layers[1].mlp.gate
    router.extra = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(CheckpointError, match=r"differs in model\.layers\.1\.mlp\.gate\.extra"):
        load_sharded_weights(tiny_moe, tmp_path)
    del router.extra, tiny_moe.model.norm
    with pytest.raises(CheckpointError, match=r"differs in model\.norm\.weight"):
        load_sharded_weights(tiny_moe, tmp_path)


def test_shards_without_optimizer_or_schedule_are_refused(tiny_moe, tmp_path):
    optimizer = torch.optim.SGD(tiny_moe.parameters(), 1.0)
    with pytest.raises(CheckpointError, match="optimizer: missing"):
        load_optimizer(tiny_moe, optimizer, tmp_path)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    with pytest.raises(CheckpointError, match=r"scheduler\.pt: missing"):
        load_scheduler(scheduler, tmp_path / "scheduler.pt")


@pytest.mark.parametrize("number", [1, 2, 4])
def test_a_schedule_goes_on_with_another_number_of_groups(tmp_path, number):
    def schedule(groups):
        weights = [{"params": [torch.nn.Parameter(torch.zeros(1))]} for _ in range(groups)]
        optimizer = torch.optim.SGD(weights, lr=2.0)
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    saved, live = schedule(2), schedule(number)
    for _ in range(3):
        saved.optimizer.step()
        saved.step()
    torch.save(saved.state_dict(), tmp_path / "scheduler.pt")
    load_scheduler(live, tmp_path / "scheduler.pt")
    assert live.get_last_lr() == [0.5] * number
    live.optimizer.step()
    live.step()
    assert [group["lr"] for group in live.optimizer.param_groups] == [0.4] * number

"""The patches in somebody else's trainer."""

import copy

import pytest
import torch

from monkey_patch import apply_patches, router_statistics
from tests.support.training import PATCHES

trl = pytest.importorskip("trl")


def _train(model, tokenizer, folder):
    datasets = pytest.importorskip("datasets")
    rows = [torch.randint(0, 320, (n,)).tolist() for n in (9, 14, 6, 11, 8, 12, 7, 10)]
    options = trl.SFTConfig(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=4,
        optim="sgd",  # Adam would blow up rounding differences of tiny gradients
        learning_rate=0.5,
        packing=True,
        max_length=64,
        gradient_checkpointing=True,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
    )
    data = datasets.Dataset.from_dict({"input_ids": rows})
    trainer = trl.SFTTrainer(model, options, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_sft_trainer_takes_two_steps_with_all_patches(model, tokenizer, tmp_path):
    unpatched = copy.deepcopy(model)
    before = model.model.layers[1].mlp.experts.down_proj.detach().clone()
    apply_patches(model, PATCHES)
    statistics = router_statistics(model)
    statistics.coefficient = 1e-6
    # A loop one does not own announces its forwards through a hook.
    model.register_forward_pre_hook(
        lambda _, args, kwargs: statistics.begin(
            None, 1, torch.tensor(1 / kwargs["input_ids"].numel())
        ),
        with_kwargs=True,
    )
    torch.manual_seed(0)
    losses = _train(model, tokenizer, tmp_path)
    assert statistics.drain()["aux_loss"] >= 1.0
    torch.manual_seed(0)
    assert losses == pytest.approx(_train(unpatched, tokenizer, tmp_path), rel=1e-4)
    assert len(losses) == 2
    assert (model.model.layers[1].mlp.experts.down_proj - before).abs().max() > 0

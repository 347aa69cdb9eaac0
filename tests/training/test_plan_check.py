import copy

import pytest
import torch
from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh
from torchao.optim import AdamW4bit, AdamW8bit

from qwen3_sft.training.plan_check import (
    PlanCheck,
    compare,
    describe,
    optimizer_bytes,
    tensor_bytes,
)
from tests.support.training import make_trainer

GIB = 2**30
PLANNED = {"weights": 60 * GIB, "optimizer": 40 * GIB, "activations": 20 * GIB, "reserve": 9 * GIB}
MEASURED = {"weights": 60 * GIB, "optimizer": 50 * GIB}
NO_SPEED = {"planned": None, "measured": 900.4}


@pytest.mark.parametrize(
    ("peak", "is_fine"), [(115, True), (125, True), (127, False), (113, False)]
)
def test_the_peak_decides_within_five_percent_of_all_but_the_reserve(peak, is_fine):
    record = compare(PLANNED, MEASURED, peak * GIB, NO_SPEED, 10)
    assert record["peak"]["planned"] == 120 * GIB
    assert record["is_within_tolerance"] == is_fine
    assert record["components"]["optimizer"]["difference"] == 0.25


def test_without_a_peak_the_components_decide():
    assert not compare(PLANNED, MEASURED, None, NO_SPEED, 10)["is_within_tolerance"]
    assert compare(PLANNED, {"weights": 60 * GIB}, None, NO_SPEED, 10)["is_within_tolerance"]


def test_the_line_says_which_part_is_off():
    speed = {"planned": 1000.0, "measured": 900.4}
    assert describe(compare(PLANNED, MEASURED, 132 * GIB, speed, 10)) == (
        "plan check at step 10: peak 132.00 GiB, 120.00 planned (+10.0%); weights 60.00 GiB, 60.00 "
        "planned (+0.0%); optimizer 50.00 GiB, 40.00 planned (+25.0%); 900 tok/s per GPU, 1,000 "
        "planned (-10.0%)"
    )
    without = describe(compare(PLANNED, MEASURED, None, NO_SPEED, 10))
    assert "on a CPU only what lasts is compared" in without
    assert "900 tok/s per GPU, none planned" in without


def test_bytes_of_torchaos_states():
    weight = torch.nn.Parameter(torch.zeros(64, 128))
    weight.grad = torch.zeros_like(weight)
    maps = {AdamW8bit: 2 * 256 * 4, AdamW4bit: 2 * 16 * 4}
    per_weight = {AdamW8bit: 2 * (1 + 4 / 256), AdamW4bit: 2 * (0.5 + 4 / 128)}
    with torch.compiler.set_stance("force_eager"):
        for kind, fixed in maps.items():
            optimizer = kind([weight])
            optimizer.step()
            expected = weight.numel() * per_weight[kind] + fixed + 4
            assert optimizer_bytes(optimizer) == expected


def test_of_a_sharded_tensor_the_shard_counts(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        mesh = init_device_mesh("cpu", (1,))
        # As rank 0 of 4 would hold it: its part of 16 rows.
        shard = DTensor.from_local(
            torch.zeros(4, 8), mesh, [Shard(0)], run_check=False, shape=torch.Size([16, 8]),
            stride=(8, 1),
        )  # fmt: skip
        assert tensor_bytes(shard) == 4 * 8 * 4
        assert tensor_bytes(DTensor.from_local(torch.zeros(3), mesh, [Replicate()])) == 12
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_run_is_compared_at_its_step_once(tiny_moe, tokenizer, tmp_path, caplog, in_backward):
    size = sum(p.numel() * 4 for p in tiny_moe.parameters())
    planned = {"weights": size, "gradients": size, "optimizer": 2 * size, "temporaries": 5 * size}
    records = []
    trainer = make_trainer(
        tiny_moe, tokenizer, tmp_path, max_steps=6, optim="adamw_torch",
        optimizer_in_backward=in_backward, save_strategy="steps", save_steps=2,
    )  # fmt: skip
    keep = lambda record: records.append(copy.deepcopy(record))  # noqa: E731
    trainer.add_callback(PlanCheck(planned, 1000.0, keep, trainer.metrics, "whole", 4))
    with caplog.at_level("INFO", logger="qwen3_sft"):
        trainer.train()
    (record,) = records
    assert record["step"] == 4
    assert record["peak"]["measured"] is None
    found = {name: pair["measured"] for name, pair in record["components"].items()}
    buffers = sum(tensor_bytes(b) for b in trainer.model.buffers())
    assert found["weights"] == size + buffers
    assert found.get("gradients") == (None if in_backward else size)
    assert found["optimizer"] == 2 * size + 4 * len(list(trainer.model.parameters()))
    assert record["tokens_per_second"]["measured"] > 0
    assert "plan check at step 4" in caplog.text
    assert record["is_within_tolerance"]
    assert "please report" not in caplog.text


def test_a_plan_that_is_off_asks_for_a_report_also_after_a_resume(
    tiny_moe, tokenizer, tmp_path, caplog
):
    arguments = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "optim": "adamw_torch"}
    make_trainer(tiny_moe, tokenizer, tmp_path, **arguments).train()
    records = []
    trainer = make_trainer(tiny_moe, tokenizer, tmp_path, **arguments)
    check = PlanCheck({"weights": 1}, None, records.append, trainer.metrics, "whole", steps=2)
    trainer.add_callback(check)
    with caplog.at_level("WARNING", logger="qwen3_sft"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert [record["step"] for record in records] == [5]
    assert "environment.json" in caplog.text

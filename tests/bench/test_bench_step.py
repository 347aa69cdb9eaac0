"""The benchmark of whole steps: its rows, its routing, where it puts the time, and that it runs."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from transformers.models.qwen3_moe import modeling_qwen3_moe

from qwen3_sft.demo.model import tiny_config, tiny_model
from qwen3_sft.errors import UsageError
from qwen3_sft.options.model_args import ModelArguments
from qwen3_sft.packing.rows import PackedDataset
from tests.support.source_tree import ROOT

CPU = SimpleNamespace(device=torch.device("cpu"))


@pytest.fixture
def bench(monkeypatch):
    """Import a module of bench/ as its scripts do."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    return import_module


@pytest.fixture
def options(bench):
    return bench("parts.step.options").StepOptions(
        layers=2, max_length=128, batch=2, document_tokens=40, warm_up=1, steps=1
    )


class TestRows:
    def test_lengths(self, bench, options):
        rows = bench("parts.step.rows")
        many = replace(options, max_length=4096, document_tokens=405)
        packed = rows.document_lengths(many, 100)
        assert packed.sum() >= 100 * 4096
        assert packed.mean() == pytest.approx(405, rel=0.1)
        assert (packed.min(), packed.max() <= 4096) == (packed.min().clip(8), True)
        assert len(rows.document_lengths(replace(many, packing=False), 100)) == 100
        fixed = rows.document_lengths(replace(many, lengths="fixed"), 100)
        assert fixed.tolist() == [4096] * 100
        facts = rows.length_facts(fixed)
        assert facts["length_weighted_mean_tokens"] == facts["mean_tokens"] == 4096

    def test_documents_are_parts_of_one_pool(self, bench, options):
        rows = bench("parts.step.rows")
        documents = rows.RandomDocuments(rows.document_lengths(options, 20), 50)
        for index, length in enumerate(documents.lengths):
            ids, trained = documents[index]
            assert len(ids) == len(trained) == length
            assert trained.sum() == length - length // 3
            assert 0 <= ids.min() <= ids.max() < 50

    @pytest.mark.parametrize("packing", [True, False])
    def test_both_layouts_are_one_batch(self, bench, options, packing):
        """Attention differs, the loss does not: no document sees another or the padding."""
        rows, losses = bench("parts.step.rows"), {}
        chosen = replace(options, packing=packing)
        documents = rows.RandomDocuments(rows.document_lengths(chosen, 4), 4096)
        data = PackedDataset(documents, chosen.max_length, packing=packing)
        for attention in ("torch_varlen", "sdpa"):
            batch = rows.collator_of(chosen, attention)([data[0], data[1]])
            is_padded = attention == "sdpa" and not packing
            assert ("attention_mask" in batch) == is_padded, "as transformers would be given it"
            del batch["stats"], batch["token_mask"]
            model, _ = bench("parts.step.model").build_model(
                chosen, CPU, ModelArguments(attn_implementation=attention, use_liger=False)
            )
            losses[attention] = model.eval()(**batch).loss.item()
            assert (
                batch["input_ids"].shape == {"torch_varlen": (1, 256), "sdpa": (2, 128)}[attention]
            )
        assert losses["sdpa"] == pytest.approx(losses["torch_varlen"], rel=1e-6)


class TestOptions:
    def test_policies(self, options):
        def policies(text: str) -> dict[str, int]:
            return replace(options, activation_checkpointing=text).policies(4)

        assert policies("selective") == {"selective": 4}
        assert policies("full=1,none=3") == {"full": 1, "none": 3}
        for wrong in ("true", "full=1", "full=x", "full,none"):
            with pytest.raises(UsageError, match="--activation_checkpointing"):
                policies(wrong)

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"breakdown": True, "torch_compile": True}, "no components"),
            ({"steps": 0}, "--steps 0"),
            ({"document_tokens": 1}, "--document_tokens 1"),
        ],
    )
    def test_what_cannot_be_measured(self, options, change, match):
        with pytest.raises(UsageError, match=match):
            replace(options, **change)

    def test_a_run_would_refuse_it_too(self, bench, options, tmp_path):
        resolve = bench("parts.step.measure").resolve
        with pytest.raises(UsageError, match="--clip per_tensor"):
            resolve(replace(options, optimizer_in_backward=True), tmp_path)
        with pytest.raises(UsageError, match="--torch_compile true"):
            resolve(replace(options, torch_compile=True, experts_implementation="eager"), tmp_path)

    def test_arguments_are_those_of_a_run(self, bench, options, tmp_path):
        chosen = replace(
            options, dtype="bfloat16", optim="adamw_torch_8bit", optimizer_in_backward=True,
            clip="per_tensor",
        )  # fmt: skip
        args, _ = bench("parts.step.measure").resolve(chosen, tmp_path)
        assert args.optim_args == "bf16_stochastic_round=True"
        assert (args.max_steps, args.per_device_train_batch_size) == (2, 2)
        assert (args.optimizer_in_backward, args.clip, args.bf16) == (True, "per_tensor", False)

    def test_plain_transformers_has_none_of_ours(self, bench, options):
        model, facts = bench("parts.step.model").build_model(
            replace(options, router_aux_loss=False, activation_checkpointing="full"), CPU,
            ModelArguments(
                experts_implementation="grouped_mm", attn_implementation="sdpa", use_liger=False
            ),
        )  # fmt: skip
        assert facts["patches"] == ["linear_cross_entropy"]
        assert model.config._experts_implementation == "grouped_mm"
        assert model.config._attn_implementation == "sdpa"
        assert all(layer.gradient_checkpointing for layer in model.model.layers)


class TestModel:
    def test_weights_exist_once(self, bench, options, monkeypatch):
        load, model = bench("load"), bench("parts.step.model")
        config = tiny_config(moe_intermediate_size=4096, num_hidden_layers=2)
        monkeypatch.setattr(model, "model_config", lambda _: config)
        with load.HostMemory() as memory:
            built, _ = model.build_model(
                replace(options, dtype="bfloat16"), CPU, ModelArguments(use_liger=False)
            )
        assert {p.dtype for p in built.parameters()} == {torch.bfloat16}
        size = sum(p.nbytes for p in built.parameters())
        assert size > 100e6
        assert memory.own < 1.3 * size

    def test_liger_is_put_back(self, bench):
        liger_kernels = bench("parts.step.model").liger_kernels
        names = ("apply_rotary_pos_emb", "Qwen3MoeRMSNorm", "Qwen3MoeExperts")
        before = [getattr(modeling_qwen3_moe, name) for name in names]
        with liger_kernels(True):
            inside = [getattr(modeling_qwen3_moe, name) for name in names]
        after = [getattr(modeling_qwen3_moe, name) for name in names]
        assert [a is b for a, b in zip(before, inside, strict=True)] == [False, False, True]
        assert after == before

    def test_loads_of_skewed_routers(self, bench):
        model = bench("parts.step.model")
        for num_experts, top_k, fullest in ((128, 8, 4.0), (16, 2, 3.2)):
            loads = model.loads(num_experts, top_k)
            assert sum(loads) == pytest.approx(num_experts)
            assert loads[0] == pytest.approx(fullest, rel=1e-6)
            assert loads == sorted(loads, reverse=True)
            scales = model.router_scales(num_experts, top_k)
            assert sum(s * s for s in scales) == pytest.approx(num_experts)
            assert scales == sorted(scales, reverse=True)

    def test_tokens_of_one_document_visit_all_experts(self, bench, options, monkeypatch):
        model = bench("parts.step.model")
        config = tiny_config(num_experts=128, num_experts_per_tok=8, num_hidden_layers=4)
        monkeypatch.setattr(model, "model_config", lambda _: config)
        args = ModelArguments(attn_implementation="sdpa", use_liger=False)
        built, _ = model.build_model(replace(options, layers=4, router_aux_loss=False), CPU, args)
        index: list[torch.Tensor] = []
        for layer in built.model.layers:
            layer.mlp.gate.register_forward_hook(lambda *call: index.append(call[-1][2]))
        with torch.no_grad():
            built(torch.randint(config.vocab_size, (1, 2048)))
        loads = [torch.bincount(i.flatten(), minlength=128) / i.numel() * 128 for i in index]
        assert len(loads) == 4
        assert max(load.max() for load in loads) < 1.8

    def test_skewed_routers_route_so(self, bench):
        config = tiny_config(num_experts=128, num_experts_per_tok=8, num_hidden_layers=2)
        model = tiny_model(config)
        x_TD = torch.randn(8192, config.hidden_size, generator=torch.Generator().manual_seed(0))

        def loads() -> list[torch.Tensor]:
            index = [layer.mlp.gate(x_TD)[2].flatten() for layer in model.model.layers]
            counts = [torch.bincount(i, minlength=128).float() for i in index]
            return [count / count.mean() for count in counts]

        assert max(load.max() for load in loads()) < 1.6
        bench("parts.step.model").skew_routers(model)
        first, second = loads()
        assert 3 < first.max() < 5
        assert 3 < second.max() < 5
        assert first.argmax() != second.argmax()
        assert first.min() < 0.5


def test_rates_are_those_of_the_middle_step(bench):
    def record(seconds: float, tokens: int) -> dict:
        return {
            "step_time_s": seconds, "tokens": tokens, "label_tokens": tokens,
            "tokens_per_second_per_gpu": tokens / seconds, "padding_fraction": 0.0,
            "model_tflops_per_gpu": 2 * tokens / seconds, "mfu": tokens / seconds / 100,
            "expert_load_max_over_mean": None,
        }  # fmt: skip

    figures = bench("parts.step.measure").figures([record(1, 10), record(1, 20), record(9, 60)])
    assert figures["tokens_per_second"] == 30
    assert figures["tflops"] == 60
    assert figures["mfu_of_device"] == pytest.approx(0.3)
    assert figures["tokens"] == {"median": 20, "min": 10, "max": 60, "mean": 30}
    assert figures["expert_load_max_over_mean"] is None


def test_it_runs(bench, tmp_path, capsys):
    out = tmp_path / "step.json"
    bench("step").main(
        ["--layers", "1", "--max_length", "128", "--batch", "2", "--document_tokens", "40",
         "--warm_up", "1", "--steps", "1", "--breakdown", "--optimizer_in_backward", "--clip",
         "per_tensor", "--optim", "adamw_torch", "--activation_checkpointing", "selective",
         "--peer", "--out", str(out)]
    )  # fmt: skip
    report = json.loads(out.read_text())
    ours, peer = report["results"]
    assert [ours["name"], peer["name"]] == ["ours", "transformers"]
    # After one step, which the two clip differently.
    assert ours["loss_first"] == pytest.approx(peer["loss_first"], rel=1e-4)
    assert ours["resolved"]["experts_implementation"] == "scatter_moe_recompute"
    assert (ours["resolved"]["layout"], peer["resolved"]["layout"]) == ("flat", "rows")
    assert not peer["options"]["optimizer_in_backward"]
    for row in (ours, peer):
        assert row["tokens_per_second"] > 0
        assert row["expert_load_max_over_mean"]["median"] >= 1
        assert row["peak_reserved_gib"] > 0
        assert 0 < row["breakdown"]["other_share"] < 0.2
        assert row["breakdown"]["us_per_token"]["optimizer"]["update"] > 0
        assert row["breakdown"]["us_per_token"]["norms_rope"]["recompute"] > 0
    assert report["commit"]
    assert report["versions"]["transformers"]
    assert "us/token" in capsys.readouterr().out


def test_a_row_that_fails_is_in_the_file(bench, tmp_path):
    out = tmp_path / "step.json"
    words = ["--attn_implementation", "flash_attention_3", "--out", str(out)]
    with pytest.raises(SystemExit, match="failed: ours"):
        bench("step").main(words)
    (row,) = json.loads(out.read_text())["results"]
    assert "flash_attention_3" in row["error"]


def test_a_mistake_of_the_users(bench, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench("step").main(["--activation_checkpointing", "some"])
    assert stopped.value.code == 2
    assert "--activation_checkpointing some" in capsys.readouterr().err

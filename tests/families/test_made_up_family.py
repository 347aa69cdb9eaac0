"""One new file is a new family: everything that looks for its modules finds them."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3_moe

import qwen3_sft.families
from monkey_patch import apply_patches, architectures, router_statistics
from monkey_patch.fp8_selection import select
from qwen3_sft.demo.model import tiny_config
from qwen3_sft.distributed.engine import Engine
from qwen3_sft.families.family import families, family_of
from qwen3_sft.model.activation_checkpointing import enable_checkpointing
from qwen3_sft.model.layer_compile import compile_layers
from qwen3_sft.model.loading import load_strict, num_experts, resolve_model
from qwen3_sft.model.meta_model import known_config, meta_model
from qwen3_sft.model.sizes import Sizes
from qwen3_sft.plan.step_time import step_time
from qwen3_sft.plan.weights import memory_plan
from qwen3_sft.plan.zero3_units import check_zero3
from tests.support.oracle import assert_close

NAMES = {
    "Qwen3MoeDecoderLayer": "MadeUpStage", "Qwen3MoeSparseMoeBlock": "MadeUpMixture",
    "Qwen3MoeExperts": "MadeUpSpecialists", "Qwen3MoeTopKRouter": "MadeUpSwitch",
    "Qwen3MoeModel": "MadeUpTower",
}  # fmt: skip
KINDS = {
    name: type(NAMES[name], (kind,), {}) for name, kind in vars(qwen3_moe).items() if name in NAMES
}
LAYERS, VOCAB = 5, 320
PATCHES = ("scatter_moe", "varlen_attention", "router_aux_loss", "linear_cross_entropy")


class MadeUpConfig(Qwen3MoeConfig):
    model_type = "made_up"


class MadeUpWriter(Qwen3MoeForCausalLM):
    config_class = MadeUpConfig

    def __init__(self, config):
        super().__init__(config)
        for module in self.modules():
            module.__class__ = KINDS.get(type(module).__name__, type(module))
        # Not even transformers knows the layers.
        self._no_split_modules = self.model._no_split_modules = None


AutoConfig.register("made_up", MadeUpConfig)
AutoModelForCausalLM.register(MadeUpConfig, MadeUpWriter)


@pytest.fixture(autouse=True)
def _one_new_file(tmp_path, monkeypatch):
    folder = tmp_path / "families"
    folder.mkdir()
    shutil.copy(Path(__file__).with_name("made_up_moe.py"), folder)
    monkeypatch.setattr(qwen3_sft.families, "__path__", [*qwen3_sft.families.__path__, str(folder)])
    monkeypatch.setattr(architectures, "_registered", [*architectures._registered])
    families.cache_clear()
    yield
    families.cache_clear()
    sys.modules.pop("qwen3_sft.families.made_up_moe", None)
    vars(qwen3_sft.families).pop("made_up_moe", None)


@pytest.fixture
def model():
    sizes: dict[str, Any] = tiny_config(
        VOCAB, hidden_size=64, moe_intermediate_size=48, num_hidden_layers=LAYERS, num_experts=8,
        head_dim=16,
    ).to_dict()  # fmt: skip
    del sizes["model_type"]
    made = MadeUpWriter(MadeUpConfig(**sizes))
    made.config.use_cache = False
    family_of(made.config)  # as every way to a model does
    return made


def test_no_rule_would_guess_it(model):
    kinds = {type(module).__name__ for module in model.modules()}
    assert set(NAMES.values()) <= kinds
    assert not set(NAMES) & kinds
    assert not any(kind.endswith(("Experts", "SparseMoeBlock", "Router")) for kind in kinds)
    assert not model._no_split_modules


def test_a_checkpoint_is_found_and_loaded(model, tmp_path):
    model.save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base/config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "made_up"
    base = resolve_model(str(tmp_path / "base"))
    assert num_experts(base) == 8
    assert type(load_strict(base)) is MadeUpWriter
    assert type(meta_model(str(base))) is MadeUpWriter


def test_a_known_name_is_planned(model):
    config = known_config("Nobody/Made-up")
    assert isinstance(config, MadeUpConfig)
    on_meta = meta_model("Nobody/Made-up")
    plan = memory_plan(
        on_meta, Engine("native", 4), weights=torch.float32, compute=torch.bfloat16, world_size=4,
        gpus_per_node=4,
    )  # fmt: skip
    assert plan.parameters == sum(p.numel() for p in on_meta.parameters())
    time = step_time(
        model.config, "H200", tokens=64, mean_length=64, layers={"none": LAYERS},
        keeps_hidden=True, optimizer_bytes=0, accumulation=1, shards=1, reduced_bytes=4,
    )  # fmt: skip
    assert time is not None


def test_layers_and_experts_are_measured(model):
    sizes, layer = Sizes.of(model), model.model.layers[0]
    experts = sum(p.numel() for p in layer.mlp.experts.parameters())
    whole = sum(p.numel() for p in layer.parameters())
    assert (sizes.layer, sizes.layer_experts) == (whole, experts)
    assert sizes.dense == LAYERS * (whole - experts)


def test_layers_are_checkpointed_and_compiled(model):
    enable_checkpointing(model, {"full": 2, "none": LAYERS - 2})
    assert [layer.gradient_checkpointing for layer in model.model.layers] == [True] * 2 + [
        False
    ] * 3
    assert compile_layers(model, backend="eager") == 1
    assert all("forward" in vars(layer) for layer in model.model.layers)


def test_layers_are_zero3_units(model):
    pytest.importorskip("deepspeed")
    config = {"zero_optimization": {"stage": 3, "leaf_module": {"classes": ["MadeUpStage"]}}}
    (unit,) = check_zero3(model, config)
    assert (unit.name, unit.count) == ("MadeUpStage", LAYERS)


def test_fp8_converts_its_experts_and_keeps_what_it_keeps(model):
    selection = select(model, attention=True, experts=True)
    assert selection.num_layers == LAYERS - 2
    assert {n for n in selection.converted if n.endswith("experts")} == {
        f"model.layers.{i}.mlp.experts" for i in range(1, LAYERS - 1)
    }
    assert selection.kept["model.layers.2.mlp.gate"] == "router"
    assert selection.kept["model.layers.2.self_attn.k_proj"] == "unfit for FP8"


def test_the_patches_serve_it(model):
    unpatched = copy.deepcopy(model)
    ids = torch.randint(0, VOCAB, (1, 48))
    ends = torch.tensor([0, 20, 48], dtype=torch.int32)
    batch = {
        "position_ids": torch.cat([torch.arange(20), torch.arange(28)])[None],
        "cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 28, "max_length_k": 28,
    }  # fmt: skip
    applied = apply_patches(model, PATCHES)
    assert applied.counts == {
        "scatter_moe": 1, "varlen_attention": 2, "router_aux_loss": LAYERS,
        "linear_cross_entropy": 2,
    }  # fmt: skip
    statistics = router_statistics(model)
    statistics.begin(None, 1, torch.tensor(1 / 48))
    separate = torch.cat([unpatched(part).logits[0] for part in ids.split((20, 28), dim=1)])
    assert_close(model(ids, **batch).logits[0], separate, name="logits")
    assert statistics.tokens_per_expert.shape == (LAYERS, 8)


def test_the_fp8_patches_serve_it(model):
    assert apply_patches(model, ["experts_fp8"]).counts["experts_fp8"] == 1 + LAYERS - 2

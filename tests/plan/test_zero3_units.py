"""The ZeRO-3 units of real configurations, computed by DeepSpeed itself on the meta device."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import (
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from qwen3_sft.demo.model import tiny_config
from qwen3_sft.errors import UsageError
from qwen3_sft.families.known_models import KNOWN_CONFIGS
from qwen3_sft.plan.zero3_units import (
    Unit,
    _count,
    _leaves,
    check_zero3,
    describe,
    granularity_threshold,
)
from tests.support.source_tree import ROOT

KNOWN = KNOWN_CONFIGS["Qwen/Qwen3-30B-A3B"]
STAGE_3 = sorted((ROOT / "config/deepspeed").glob("zero3*.json"))
LAYER = {"leaf_module": {"classes": ["Qwen3MoeDecoderLayer"]}}


@pytest.fixture(scope="module")
def model() -> Qwen3MoeForCausalLM:
    with torch.device("meta"):
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**KNOWN))


def shipped(name: str) -> dict:
    return json.loads((ROOT / f"config/deepspeed/{name}.json").read_text(encoding="utf-8"))


def zero3_units(model, config) -> list[Unit]:
    """What DeepSpeed gathers as one piece, computed by its own code and not judged."""
    return _count(_leaves(model, config))


def stage_3(**settings) -> dict:
    return {"zero_optimization": {"stage": 3, **settings}}


@pytest.mark.parametrize("path", STAGE_3, ids=lambda path: path.stem)
def test_shipped_files_make_each_layer_a_unit(model, path):
    units = check_zero3(model, shipped(path.stem))
    assert units == [Unit("Qwen3MoeDecoderLayer", 48, 623_120_640)]
    line = "ZeRO-3 units: 48 x Qwen3MoeDecoderLayer of 623.1 M parameters"
    assert describe(units) == line


def test_shipped_threshold_suffices_without_class_names(model):
    config = shipped("zero3_threshold")
    config["zero_optimization"]["leaf_module"] = {"classes": []}
    assert check_zero3(model, config) == [Unit("Qwen3MoeDecoderLayer", 48, 623_120_640)]
    least = granularity_threshold(model)
    assert least == 47_932_356 <= config["zero_optimization"]["stage3_module_granularity_threshold"]
    below = stage_3(leaf_module={"classes": []}, stage3_module_granularity_threshold=least - 1)
    assert "Qwen3MoeDecoderLayer" not in {unit.name for unit in zero3_units(model, below)}


@pytest.mark.parametrize("name", ["zero3", "zero3_offload"])
def test_vision_language_model_has_its_layers_as_units(name):
    config = Qwen3VLMoeConfig(text_config={**KNOWN, "num_hidden_layers": 2})
    with torch.device("meta"):
        model = Qwen3VLMoeForConditionalGeneration(config)
    units = check_zero3(model, shipped(name))
    assert units == [Unit("Qwen3VLMoeTextDecoderLayer", 2, 623_120_640)]


def test_what_old_and_advised_values_select(model):
    """The value of the layout with separate experts: nothing; DeepSpeed's advice: attention."""
    none = stage_3(leaf_module={"classes": []}, stage3_module_granularity_threshold=1_175_567)
    assert zero3_units(model, none) == []
    advised = stage_3(leaf_module={"classes": []}, stage3_module_granularity_threshold=2_696_374)
    assert zero3_units(model, advised) == [Unit("Qwen3MoeAttention", 48, 18_874_624)]
    # DeepSpeed's own list of classes knows the text model's block.
    assert zero3_units(model, stage_3()) == [Unit("Qwen3MoeSparseMoeBlock", 48, 604_241_920)]
    for config in (none, advised):
        with pytest.raises(UsageError, match="48 MoE blocks") as error:
            check_zero3(model, config)
        assert '["Qwen3MoeDecoderLayer"]' in str(error.value)
        assert "stage3_module_granularity_threshold to 47932356" in str(error.value)


def test_the_model_is_left_unchanged(model):
    before = [sorted(vars(m)) for m in model.modules()]
    check_zero3(model, shipped("zero3_threshold"))
    assert [sorted(vars(m)) for m in model.modules()] == before
    assert not any("ds_numel" in vars(p) for p in model.parameters())


def test_a_threshold_makes_a_small_model_one_unit():
    with torch.device("meta"):
        tiny = Qwen3MoeForCausalLM(tiny_config(1024))
    assert {unit.name for unit in check_zero3(tiny, shipped("zero3"))} == {"Qwen3MoeDecoderLayer"}
    assert zero3_units(tiny, shipped("zero3_threshold"))[0].name == "Qwen3MoeForCausalLM"
    with pytest.raises(UsageError, match="several MoE blocks in one unit"):
        check_zero3(tiny, shipped("zero3_threshold"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stage3_prefetch_bucket_size": "auto"}, "prefetch_bucket_size 3774873 is too small"),
        ({"stage3_prefetch_bucket_size": 622_854_143}, "set it to 622854144 or more"),
        ({"stage3_max_live_parameters": 1_868_038_143}, "set it to 1868038144 or more"),
        ({"stage3_max_live_parameters": 1e9}, "max_live_parameters 1000000000 is too small"),
    ],
)
def test_limits_smaller_than_a_unit_are_refused(model, settings, message):
    config = shipped("zero3")
    config["zero_optimization"] |= settings
    with pytest.raises(UsageError, match=message):
        check_zero3(model, config)


@pytest.mark.parametrize("path", STAGE_3, ids=lambda path: path.stem)
def test_numbers_of_the_shipped_files(model, path):
    """What the docstring of qwen3_sft/plan/zero3_units.py says of each."""
    zero = shipped(path.stem)["zero_optimization"]
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    persistent = {n for n, s in sizes.items() if s <= zero["stage3_param_persistence_threshold"]}
    small = {n for n in sizes if "norm" in n or n.endswith("mlp.gate.weight")}
    assert persistent == small
    first = {n: s for n, s in sizes.items() if ".layers.0." in n}
    sharded = sum(s for n, s in first.items() if n not in persistent)
    assert zero["stage3_prefetch_bucket_size"] == sharded
    ends = sizes["model.embed_tokens.weight"] + sizes["lm_head.weight"]
    assert zero["stage3_max_live_parameters"] >= 2 * sharded + ends
    # From the end of the last layer to its backward pass: norm and head. To that of the layer
    # before: the last layer as well.
    reuse = zero["stage3_max_reuse_distance"]
    assert sizes["lm_head.weight"] + sizes["model.norm.weight"] < reuse <= sum(first.values())
    experts = {n: s for n, s in first.items() if "experts" in n}
    assert sum(first.values()) - sum(experts.values()) <= zero["reduce_bucket_size"]
    assert min(experts.values()) > zero["reduce_bucket_size"]


def test_bucket_of_stage_2_holds_the_largest_tensor(model):
    zero = shipped("zero2")["zero_optimization"]
    assert zero["reduce_bucket_size"] >= max(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ["zero2", *(path.stem for path in STAGE_3)])
def test_deepspeed_reads_what_is_set(name):
    """An unknown key would be kept as an extra field, and one that is misspelt ignored."""
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    config = shipped(name)
    zero = config["zero_optimization"]
    known = {f.alias or n for n, f in DeepSpeedZeroConfig.model_fields.items()}
    assert set(zero) <= known
    # A step whose gradients are not finite is left out: stage 3 always looks, stage 2 if told to.
    assert DeepSpeedBF16Config(enabled=True, check_grad_overflow=True).check_grad_overflow
    assert config["bf16"] == {"enabled": "auto", "check_grad_overflow": True}
    assert "offload_optimizer" in zero or "offload" not in name


def test_micro_batches_are_added_in_float32():
    """DeepSpeed's default is the dtype of the weights: 8 bits of each micro-batch's gradient."""
    from deepspeed.runtime.config import DtypeEnum

    for name in ("zero3", "zero3_threshold"):
        dtype = shipped(name)["data_types"]["grad_accum_dtype"]
        assert DtypeEnum(dtype).value == torch.float32

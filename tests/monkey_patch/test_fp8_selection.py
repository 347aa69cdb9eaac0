"""Which modules compute in FP8: by what they are and where they stand, and nothing in silence."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from monkey_patch import PatchError
from monkey_patch.fp8_selection import describe, select
from qwen3_sft.demo.model import tiny_config, tiny_model
from qwen3_sft.families.flops import ModelFlops

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def attention_of(*layers):
    return {f"model.layers.{i}.self_attn.{p}" for i in layers for p in PROJECTIONS}


def experts_of(*layers):
    return {f"model.layers.{i}.mlp.experts" for i in layers}


@pytest.fixture
def five_layers(make_model):
    return make_model(num_hidden_layers=5, mlp_only_layers=[])


def test_everything_but_what_is_kept_by_name(five_layers):
    selection = select(five_layers, attention=True, experts=True)
    assert set(selection.converted) == attention_of(1, 2, 3) | experts_of(1, 2, 3)
    assert selection.num_layers == 3
    kept = selection.kept
    layer = "model.layers"
    assert kept["lm_head"] == "lm_head"
    assert kept["model.embed_tokens"] == "embedding"
    assert {kept[f"{layer}.{i}.mlp.gate"] for i in range(5)} == {"router"}
    norms = ["model.norm", f"{layer}.2.input_layernorm", f"{layer}.2.self_attn.q_norm"]
    assert {kept[name] for name in norms} == {"norm"}
    assert {kept[name] for name in attention_of(0) | experts_of(0)} == {"first decoder layer"}
    assert {kept[name] for name in attention_of(4) | experts_of(4)} == {"last decoder layer"}


def test_every_owner_of_parameters_is_accounted_for(five_layers):
    selection = select(five_layers, attention=True, experts=False, keep=["*.k_proj"])
    owners = {name.rpartition(".")[0] for name, _ in five_layers.named_parameters()}
    assert owners == set(selection.converted) | set(selection.kept)
    assert not set(selection.converted) & set(selection.kept)


@pytest.mark.parametrize(("attention", "experts"), [(True, False), (False, True)])
def test_halves(five_layers, attention, experts):
    selection = select(five_layers, attention=attention, experts=experts)
    halves = {True: attention_of(1, 2, 3), False: experts_of(1, 2, 3)}
    assert set(selection.converted) == halves[attention]
    assert {selection.kept[name] for name in halves[experts]} == {"not asked for"}


def test_a_dense_layers_mlp_belongs_to_the_linear_half(make_model):
    model = make_model(num_hidden_layers=4, mlp_only_layers=[1])
    mlp = {f"model.layers.1.mlp.{p}" for p in ("gate_proj", "up_proj", "down_proj")}
    linear, experts = (select(model, attention=a, experts=not a) for a in (True, False))
    assert set(linear.converted) == attention_of(1, 2) | mlp
    assert set(experts.converted) == experts_of(2)


def test_shares_are_those_of_the_flop_count():
    config = tiny_config(320, num_hidden_layers=6, head_dim=48)
    selection = select(tiny_model(config), attention=True, experts=True)
    flops = ModelFlops.from_config(config)
    total = flops.linear_per_token + flops.lm_head
    layer = (flops.attention_projections + flops.experts) / 6 / total
    assert selection.share == pytest.approx(4 * layer)
    assert selection.kept_shares == pytest.approx(
        {
            "router": flops.router / total, "lm_head": flops.lm_head / total, "norm": 0,
            "embedding": 0, "first decoder layer": layer, "last decoder layer": layer,
        }
    )  # fmt: skip
    halves = [select(tiny_model(config), attention=a, experts=not a).share for a in (True, False)]
    assert sum(halves) == pytest.approx(selection.share)


def test_description_of_the_released_model():
    """48 layers of Qwen3-30B-A3B; weights on the meta device are counted like any."""
    sizes = {
        "hidden_size": 2048, "moe_intermediate_size": 768, "num_hidden_layers": 48,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "num_experts": 128, "num_experts_per_tok": 8,
    }  # fmt: skip
    with torch.device("meta"):
        model = tiny_model(tiny_config(151_936, **sizes))
    assert describe(select(model, attention=True, experts=True)) == (
        "FP8: 85.6% of linear FLOPs in 46 layers; BF16: lm_head 10.2%, first decoder layer 1.9%, "
        "last decoder layer 1.9%, router 0.4%, embedding, norm"
    )


@pytest.mark.parametrize(
    ("pattern", "kept"),
    [
        ("*.k_proj", {f"model.layers.{i}.self_attn.k_proj" for i in (1, 2, 3)}),
        ("model.layers.2", attention_of(2) | experts_of(2)),
        ("model.layers.[12].self_attn", attention_of(1, 2)),
        ("*.experts", experts_of(1, 2, 3)),
        ("*layers.3.*", attention_of(3) | experts_of(3)),
    ],
)
def test_keep_names_modules_and_what_is_inside(five_layers, pattern, kept):
    selection = select(five_layers, attention=True, experts=True, keep=[pattern])
    everything = attention_of(1, 2, 3) | experts_of(1, 2, 3)
    assert set(selection.converted) == everything - kept
    assert {selection.kept[name] for name in kept} == {f"keep pattern {pattern!r}"}


def test_a_pattern_does_not_hide_what_a_module_is(five_layers):
    kept = select(five_layers, attention=True, experts=True, keep=["*layers.0*", "*.gate"]).kept
    assert kept["model.layers.0.self_attn.q_proj"] == "first decoder layer"
    assert kept["model.layers.2.mlp.gate"] == "router"


@pytest.mark.parametrize("pattern", ["layers.2", "*.qproj", "model.layers.5.*", ""])
def test_a_pattern_that_matches_nothing_is_named(five_layers, pattern):
    with pytest.raises(PatchError, match="matches none") as error:
        select(five_layers, attention=True, experts=True, keep=["*.k_proj", pattern])
    assert repr(pattern) in str(error.value)


@pytest.mark.parametrize("layers", [1, 2])
def test_one_or_two_layers_leave_nothing(make_model, layers):
    model = make_model(num_hidden_layers=layers, mlp_only_layers=[])
    with pytest.raises(PatchError, match=rf"has {layers} decoder layers?, and the first.*3 layers"):
        select(model, attention=True, experts=True)


def test_nothing_left_says_what_keeps_the_rest(five_layers, make_model):
    with pytest.raises(PatchError, match=r"convert nothing.*15 modules: keep pattern '\*layers\*'"):
        select(five_layers, attention=True, experts=True, keep=["*layers*"])
    dense = make_model(num_hidden_layers=3, mlp_only_layers=[0, 1, 2])
    with pytest.raises(PatchError, match=r"convert nothing.*7 modules: not asked for"):
        select(dense, attention=False, experts=True)


def test_a_wrapped_model_and_one_without_a_decoder(five_layers):
    wrapped = nn.ModuleDict({"module": five_layers})
    inner, outer = (select(m, attention=True, experts=True) for m in (five_layers, wrapped))
    assert outer.converted == tuple(f"module.{name}" for name in inner.converted)
    assert outer.share == inner.share
    with pytest.raises(PatchError, match="Linear contains no Hugging Face model"):
        select(nn.Linear(16, 16), attention=True, experts=True)


def test_the_vision_tower_stays_and_does_not_count(vl_model):
    with pytest.raises(PatchError, match="2 decoder layers"):
        select(vl_model, attention=True, experts=True)
    text = vl_model.model.language_model
    text.layers.extend([text.layers[1].__class__(text.config, 2)])
    selection = select(vl_model, attention=True, experts=True)
    prefix = "model.language_model.layers.1"
    attention = {f"{prefix}.self_attn.{p}" for p in PROJECTIONS}
    assert set(selection.converted) == attention | {f"{prefix}.mlp.experts"}
    visual = {name: why for name, why in selection.kept.items() if "visual" in name}
    assert set(visual.values()) == {"vision tower"}
    assert "model.visual.blocks.0.attn.qkv" in visual
    assert "vision tower" not in selection.kept_shares
    assert sum(selection.kept_shares.values()) + selection.share == pytest.approx(1)


def test_widths_are_multiples_of_16(make_model):
    model = make_model(num_hidden_layers=3, mlp_only_layers=[], head_dim=20, num_attention_heads=2)
    with pytest.raises(PatchError, match=r"layers.1.self_attn.q_proj.*40 is no multiple of 16"):
        select(model, attention=True, experts=False)
    assert set(select(model, attention=False, experts=True).converted) == experts_of(1)
    assert select(model, attention=True, experts=True, keep=["*.self_attn"]).share > 0


class Adapter(nn.Module):
    """The names of an adapter layer of PEFT, which is not installed everywhere."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(64, 16, bias=False)})


class Packed(nn.Linear):
    """A subclass of nn.Linear that multiplies in its own way, as those of quantisers are."""


def replace_one(model, kind):
    attention = model.model.layers[2].self_attn
    if kind == "adapter":
        attention.q_proj = Adapter(attention.q_proj)
    elif kind == "subclass":
        attention.q_proj = Packed(64, 64)
    elif kind == "float8":
        attention.q_proj.weight = nn.Parameter(
            attention.q_proj.weight.detach().to(torch.float8_e4m3fn), requires_grad=False
        )
    elif kind == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(attention.q_proj, Int8WeightOnlyConfig())


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("adapter", "q_proj.base_layer belongs to an adapter layer; apply FP8 before"),
        ("subclass", "q_proj is Packed, which multiplies in its own way"),
        ("float8", "q_proj.weight is torch.float8_e4m3fn; FP8 needs weights in bfloat16"),
        ("torchao", "q_proj.weight is Int8Tensor; FP8 needs weights in bfloat16"),
    ],
)
def test_what_cannot_be_converted_is_refused_or_kept_by_name(five_layers, kind, message):
    replace_one(five_layers, kind)
    with pytest.raises(PatchError, match=message):
        select(five_layers, attention=True, experts=True)
    selection = select(five_layers, attention=True, experts=True, keep=["*.2.self_attn.q_proj"])
    assert any(name.startswith("model.layers.2.self_attn.q_proj") for name in selection.kept)

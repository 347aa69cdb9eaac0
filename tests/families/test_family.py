"""What is not built yet is refused by one sentence, wherever a model is first looked at."""

from __future__ import annotations

import fnmatch
import json
import re
import subprocess
import sys

import pytest
import transformers
from transformers import AutoConfig

from monkey_patch.architectures import architecture_of
from qwen3_sft.chat.templates import CHAT_FORMATS
from qwen3_sft.commands.plan import command
from qwen3_sft.dry_run import dry_run
from qwen3_sft.errors import FlopsError, ModelError
from qwen3_sft.families.family import SUPPORTED, families, family_of, require_by_name
from qwen3_sft.model.loading import resolve_model
from qwen3_sft.model.meta_model import known_config, meta_model, model_on_meta
from qwen3_sft.options.recipe import parse_options
from tests.support.source_tree import ROOT

NOT_BUILT = {
    "qwen3_vl_moe": "Qwen3-VL-MoE", "qwen3_vl_moe_text": "Qwen3-VL-MoE",
    "qwen3_next": "Qwen3-Next",
    "qwen3_5_moe": "Qwen3.5-MoE", "qwen3_5_moe_text": "Qwen3.5-MoE",
}  # fmt: skip
DEMO = str(ROOT / "config/recipe/demo.yaml")
TINY = {"num_hidden_layers": 4, "hidden_size": 64, "num_experts": 4, "vocab_size": 320}
INSTEAD = "use a Qwen3-MoE such as Qwen/Qwen3-30B-A3B"


@pytest.fixture
def folder(tmp_path, request):
    config = AutoConfig.for_model(request.param)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()), encoding="utf-8")
    return tmp_path


def refusal(model_type: str) -> str:
    return rf"{re.escape(NOT_BUILT[model_type])} .* yet: {INSTEAD}"


each_folder = pytest.mark.parametrize(
    ("folder", "model_type"), [(t, t) for t in NOT_BUILT], indirect=["folder"], ids=list(NOT_BUILT)
)


@each_folder
@pytest.mark.parametrize("look", [resolve_model, meta_model], ids=["train", "meta"])
def test_a_run_is_refused(folder, model_type, look):
    with pytest.raises(ModelError, match=refusal(model_type)):
        look(str(folder))


@each_folder
@pytest.mark.parametrize("gpus", ["1xH200", "8xH200"])
def test_plan_and_dry_run_are_refused(folder, model_type, gpus):
    model = ["--model_name_or_path", str(folder)]
    with pytest.raises(ModelError, match=refusal(model_type)):
        command([DEMO, *model, "--gpus", gpus])
    with pytest.raises(ModelError, match=refusal(model_type)):
        list(dry_run(parse_options(["--config", DEMO, *model]), {}))


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("Qwen/Qwen3-VL-30B-A3B-Instruct", "Qwen3-VL-MoE"),
        ("Qwen/Qwen3-VL-235B-A22B-Thinking", "Qwen3-VL-MoE"),
        ("Qwen/Qwen3-Next-80B-A3B-Instruct", "Qwen3-Next"),
        ("Qwen/Qwen3.5-35B-A3B-Base", "Qwen3.5-MoE"),
        ("Qwen/Qwen3.6-35B-A3B", "Qwen3.5-MoE"),
    ],
)
def test_a_name_of_the_hub_is_refused_before_a_download(name, family):
    with pytest.raises(ModelError, match=f"{re.escape(name)}: {re.escape(family)} "):
        resolve_model(name)
    with pytest.raises(ModelError, match=re.escape(family)):
        command([DEMO, "--model_name_or_path", name, "--gpus", "1xH200"])


def test_names_that_are_trained_or_unknown_pass():
    for name in ("Qwen/Qwen3-235B-A22B", "Qwen/Qwen3-VL-8B-Instruct", "somebody/else"):
        require_by_name("train", name)


def test_plan_ends_with_2_and_one_line(tmp_path):
    config = AutoConfig.for_model("qwen3_5_moe").to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    argv = ["plan", DEMO, "--gpus", "1xH200", "--model_name_or_path", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "qwen3_sft.cli", *argv], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert f"error: {tmp_path}: Qwen3.5-MoE" in done.stderr
    assert not done.stdout


@pytest.mark.parametrize("model_type", ["llama", "qwen3", None])
def test_an_unknown_model_type_is_told_what_is_trained(model_type):
    with pytest.raises(ModelError) as error:
        family_of(model_type, "here")
    message = f"here: model_type is {model_type!r}; this project trains qwen3_moe"
    assert str(error.value) == message


def test_plan_refuses_another_architecture(tmp_path):
    config = AutoConfig.for_model("llama").to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    argv = [DEMO, "--model_name_or_path", str(tmp_path), "--gpus", "1xH200"]
    with pytest.raises(ModelError, match="model_type is 'llama'; this project trains qwen3_moe"):
        command(argv)


@pytest.mark.parametrize("family", families(), ids=lambda family: family.name)
def test_names_are_those_of_transformers(family):
    """Its config builds a model in which every name is found."""
    config = AutoConfig.for_model(family.model_types[0])
    text = config.get_text_config()
    assert {config.model_type, text.model_type} == set(family.model_types)
    assert text.model_type in family.architecture.model_types
    for name, value in TINY.items():
        setattr(text, name, value)
    model = model_on_meta(config)
    assert architecture_of(model) is family.architecture
    kinds = {type(module).__name__ for module in model.modules()}
    fields = set(vars(family.architecture)) - {"model_types", "vision", "fp8_keep"}
    named = {kind for field in fields for kind in getattr(family.architecture, field)}
    assert named <= kinds
    for found in ("layers_in", "experts_in", "blocks_in"):
        assert len(getattr(family.architecture, found)(model)) == text.num_hidden_layers
    modules = [name for name, _ in model.named_modules()]
    assert set(family.architecture.vision) <= {part for n in modules for part in n.split(".")}
    assert all(fnmatch.filter(modules, pattern) for pattern in family.architecture.fp8_keep)
    assert hasattr(transformers, family.auto_class)


@pytest.mark.parametrize("family", families(), ids=lambda family: family.name)
def test_what_is_supported_is_complete(family):
    assert set(family.chat_formats) <= set(CHAT_FORMATS)
    assert set(family.capabilities) == {"train"}
    if family.capabilities["train"] != SUPPORTED:
        return
    (known, *_) = family.known_configs
    config = known_config(known)
    assert family.count_flops(config).experts > 0
    assert family.count_parameters(config).total > 0
    assert family.chat_formats
    assert set(family.known_configs) == set(family.hub_names)


def test_what_is_not_counted_is_said():
    with pytest.raises(FlopsError, match="Qwen3NextConfig: nobody has written down"):
        family_of("qwen3_next").count_flops(AutoConfig.for_model("qwen3_next"))


def test_model_types_belong_to_one_family():
    types = [model_type for family in families() for model_type in family.model_types]
    assert len(types) == len(set(types))


@pytest.mark.parametrize("family", [f for f in families() if f.capabilities["train"] == SUPPORTED])
def test_the_launch_files_shard_its_layers(family):
    layers = set(family.architecture.layers)
    for path in sorted((ROOT / "config").rglob("*.json")):
        config = json.loads(path.read_text(encoding="utf-8"))
        fsdp = config.get("fsdp_config", {}).get("fsdp_transformer_layer_cls_to_wrap")
        assert fsdp is None or layers <= set(fsdp.split(",")), path
        leaves = config.get("zero_optimization", {}).get("leaf_module", {}).get("classes")
        assert leaves is None or layers <= set(leaves), path

"""Nothing in data or model folders runs code, names stay names, and secrets stay secret.

Checkpoints: tests/checkpoints/test_trust.py; our own code: test_own_code.py. The list:
docs/security.md.
"""

import contextlib
import io
import json
import logging
import shutil

import pytest
import torch
from huggingface_hub import constants

from qwen3_sft.chat.template_process import is_shipped, render_apart
from qwen3_sft.checkpoints.manifest import read_manifest, seal
from qwen3_sft.data.prepare import prepare
from qwen3_sft.demo.model import trl_chat_template, write_checkpoint
from qwen3_sft.errors import DataError, ModelError, UsageError
from qwen3_sft.model.loading import load_strict, load_tokenizer, resolve_model
from qwen3_sft.model.meta_model import meta_model
from qwen3_sft.options.data_args import DataArguments
from qwen3_sft.options.recipe import parse_options
from qwen3_sft.records.secret_options import MASK, is_secret, masked
from qwen3_sft.run import run_command
from tests.support.data_rows import read_rows, sums
from tests.support.faults import outcome

LEAST = ("--model_name_or_path", "m", "--dataset", "d")
SECRETS = {"HF_TOKEN": "hf_sentinelOfTheHub", "WANDB_API_KEY": "sentinel0fWandb"}
HUB_TOKEN = "hf_sentinelOnTheCommandLine"


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "base"
    write_checkpoint(folder, tokenizer)
    return folder


@pytest.fixture
def model(base, tmp_path):
    return shutil.copytree(base, tmp_path / "model")


@pytest.fixture
def script(tmp_path):
    """Source that leaves a file when it is run, and the file."""
    sentinel = tmp_path / "ran"
    return f"open({str(sentinel)!r}, 'w').close()\n", sentinel


def change(folder, name="config.json", **values):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# ---- the model's folder ----


def test_code_that_a_model_brings_along_is_not_run(model, script):
    source, sentinel = script
    (model / "custom_generate").mkdir()
    for name in (
        "modeling.py",
        "configuration.py",
        "tokenization.py",
        "custom_generate/generate.py",
    ):
        (model / name).write_text(source)
    names = {"AutoConfig": "configuration.C", "AutoModelForCausalLM": "modeling.M"}
    trusting = {"trust_remote_code": True}
    change(model, auto_map=names, custom_generate=str(model), **trusting)
    tokenizers = {"AutoTokenizer": ["tokenization.T", "tokenization.T"]}
    change(model, "tokenizer_config.json", auto_map=tokenizers, **trusting)
    meta_model(str(model))
    load_tokenizer(resolve_model(str(model)))
    loaded = load_strict(model)
    assert type(loaded).__module__.startswith("transformers.models.qwen3_moe")
    assert not sentinel.exists()


@pytest.mark.parametrize("architecture", ["qwen2_moe", "evil", None])
def test_other_architectures_are_refused(model, architecture):
    change(model, model_type=architecture, auto_map={"AutoConfig": "configuration.C"})
    with pytest.raises(ModelError, match="model_type is"):
        resolve_model(str(model))


@pytest.mark.parametrize(
    "name", ["attn_implementation", "_attn_implementation", "experts_implementation"]
)
def test_kernels_from_the_hub_are_refused(model, name):
    change(model, **{name: "org/repo"})
    for load in (lambda: meta_model(str(model)), lambda: load_strict(model)):
        with pytest.raises(ModelError, match="implementation to 'org/repo', a kernel from the hub"):
            load()
    with pytest.raises(UsageError, match="attn_implementation"):
        parse_options([*LEAST, "--attn_implementation", "org/repo"])


def test_pickled_weights_are_not_loaded(model, script):
    weights = load_strict(model).state_dict()
    torch.save(weights, model / "pytorch_model.bin")
    for file in model.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ModelError, match=r"pytorch_model\.bin is a pickle.*use_safetensors=False"):
        load_strict(model)
    (model / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match=r"no \*\.safetensors file\. To|no \*\.safetensors"):
        load_strict(model)


def test_weights_are_those_of_the_folder(model):
    change(model, transformers_weights="../other.safetensors")
    with pytest.raises(ModelError, match="transformers_weights"):
        load_strict(model)


# ---- chat templates ----

HOSTILE = (
    "{{ ''.__class__.__mro__ }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{% include '/etc/passwd' %}",
    "{{ raise_exception('x') }}",
)


def test_a_template_that_is_not_shipped_runs_apart(tokenizer, tmp_path, monkeypatch):
    """Compared it has to be, so it is rendered: in a process that can do and see nothing."""
    hostile = trl_chat_template("qwen3") + "{{ ''.__class__.__mro__ }}"
    assert is_shipped(trl_chat_template("qwen3"))
    assert not is_shipped(hostile)
    assert not is_shipped({"default": trl_chat_template("qwen3")})
    monkeypatch.setattr(tokenizer, "chat_template", hostile)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, sums(2))))
    data = DataArguments(dataset=[str(tmp_path / "rows.jsonl")], data_cache_dir=str(tmp_path))
    with pytest.raises(DataError, match=r"cannot be rendered: .*unsafe"):
        prepare(data, tokenizer)


@pytest.mark.faults
@pytest.mark.parametrize("template", HOSTILE)
def test_hostile_templates_fail(template):
    with pytest.raises(ValueError, match="cannot be rendered"):
        render_apart(template, [{"messages": [], "tools": None}], {})


@pytest.mark.faults
def test_templates_have_little_time_and_memory(monkeypatch):
    conversations = [{"messages": [{"role": "user", "content": "a"}], "tools": None}]
    assert render_apart("{{ messages[0].content }}{{ bos }}", conversations, {"bos": "b"}) == ["ab"]
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(ValueError, match="more than 1 s of computing"):
        render_apart(loops, conversations, {}, cpu_s=1)
    with pytest.raises(ValueError, match="MemoryError"):
        render_apart("{{ ('x' * 1000000000) ~ ('y' * 1000000000) }}", conversations, {})
    with pytest.raises(ValueError, match="characters for one conversation"):
        render_apart("{{ 'x' * 50000000 }}", conversations, {})


# ---- data ----


def test_dataset_scripts_are_refused(tmp_path, monkeypatch, script):
    source, sentinel = script
    folder = tmp_path / "data"
    (folder / "evil").mkdir(parents=True)
    for file in (folder / "evil.py", folder / "evil" / "evil.py"):
        file.write_text(source)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    for name in ("evil.py", "evil", str(folder / "evil"), str(folder / "evil" / "evil.py")):
        with pytest.raises(DataError, match=r"evil\.py: unknown kind of file|it has evil\.py"):
            read_rows(DataArguments(dataset=[name]))
    shutil.rmtree(folder / "evil")  # now `evil` looks like a hub id, beside evil.py
    with pytest.raises(DataError, match="evil:train: neither a file"):
        read_rows(DataArguments(dataset=["evil"]))
    assert not sentinel.exists()


# ---- names ----


@pytest.mark.parametrize("option", ["--run_name", "--project"])
@pytest.mark.parametrize("name", ["../../x", "/tmp/x", "a/b", "..", "a\\b", ".hidden"])
def test_names_are_no_paths(option, name):
    with pytest.raises(UsageError, match=f"{option} .*a name, not a path"):
        parse_options([*LEAST, option, name])


def test_ordinary_names_are_fine():
    assert parse_options([*LEAST, "--run_name", "lr 1e-5, v2.1"]).train.run_name


# ---- secrets ----


def test_secrets_are_left_out_of_recipes_and_printed_commands():
    options = parse_options([*LEAST, "--hub_token", HUB_TOKEN])
    assert options.train.hub_token == HUB_TOKEN
    assert "hub_token" not in options.resolved()
    words = ["python", "--hub_token", HUB_TOKEN, "--hub-token=" + HUB_TOKEN, "--seed", "3"]
    assert masked(words) == ["python", "--hub_token", MASK, f"--hub-token={MASK}", "--seed", "3"]
    assert not is_secret("--sample_max_new_tokens")
    assert is_secret("--some_api_key")


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    """A run with secrets around it: its words, its folder and all that was printed or logged."""
    root = tmp_path_factory.mktemp("finished")
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, sums(8))))
    words = [
        "--model_name_or_path", base, "--dataset", root / "rows.jsonl", "--data_cache_dir",
        root / "cache", "--max_length", 64, "--max_steps", 1, "--save_steps", 1, "--use_cpu",
        "true", "--hub_token", HUB_TOKEN, "--run_name", "one",
    ]  # fmt: skip
    own = [*map(str, words), "--output_dir", str(root / "run")]
    printed = io.StringIO()
    handler = logging.StreamHandler(printed)
    loggers = [logging.getLogger(name) for name in (None, "qwen3_sft", "monkey_patch")]
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        for log in loggers:
            patch.setattr(log, "level", logging.DEBUG)
            log.addHandler(handler)
            stack.callback(log.removeHandler, handler)
        stack.enter_context(contextlib.redirect_stdout(printed))
        stack.enter_context(contextlib.redirect_stderr(printed))
        assert run_command(own) == 0
        assert run_command([*own, "--dry_run", "true"]) == 0
    return [str(word) for word in words], root, printed.getvalue()


def test_tokens_reach_no_file_and_no_log(finished):
    _, root, printed = finished
    assert "checkpoint-1" in printed
    texts = {"printed": printed}
    for file in root.rglob("*"):
        if file.is_file():
            texts[str(file)] = file.read_bytes().decode("latin-1")
    for name in ("manifest.json", "config.yaml", "environment.json", "trainer_state.json"):
        assert any(text.endswith(name) for text in texts), name
    for where, text in texts.items():
        for secret in (*SECRETS.values(), HUB_TOKEN):
            assert secret not in text, where


def planted(finished, tmp_path, sentinel):
    """A copy of the run's checkpoint, sealed with a pickle in it that leaves a file."""
    folder = shutil.copytree(finished[1] / "run" / "checkpoint-1", tmp_path / "checkpoint-1")
    (folder / "state").mkdir()
    code = f"open({str(sentinel)!r}, 'w').close()"
    pickled = b"cbuiltins\nexec\n(V" + code.encode() + b"\ntR."
    (folder / "state" / ".metadata").write_bytes(pickled)
    facts = {k: v for k, v in read_manifest(folder).items() if k != "files"}
    seal(folder, {}, **facts)
    return folder


@outcome(
    "A pickle that would run code in any file of a checkpoint",
    "exit code 1 before anything is loaded, naming file and import; `--trust_checkpoint true` "
    "overrules",
)
def test_a_resume_looks_at_the_checkpoint_first(finished, tmp_path, script):
    words, *_ = finished
    words = [*words, "--output_dir", str(tmp_path / "run")]
    folder = planted(finished, tmp_path, script[1])
    printed = io.StringIO()
    handler = logging.StreamHandler(printed)
    handler.setLevel(logging.ERROR)
    logging.getLogger("qwen3_sft").addHandler(handler)
    try:
        assert run_command([*words, "--resume", str(folder)]) == 1
        # A checkpoint of the run's own folder is looked at as well, and not passed over.
        folder.rename(tmp_path / "run" / "checkpoint-1")
        assert run_command(words) == 1
        refused = printed.getvalue().splitlines()
        assert run_command([*words, "--trust_checkpoint", "true"]) == 0  # nobody loads this file
    finally:
        logging.getLogger("qwen3_sft").removeHandler(handler)
    assert len(refused) == 2
    assert all(".metadata would import builtins.exec: refused" in line for line in refused)
    assert not script[1].exists()

